"""One training run on accelerate: device, mixed precision, accumulation, clipping and trackers are its; the rest is here."""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from schatten.lab import optimizers, sharding
from schatten.lab.config import CompareConfig, Run
from schatten.lab.data import Corpus, batch, validation_windows
from schatten.lab.instruments import Instruments, batches
from schatten.lab.models import GPT, GPTConfig
from schatten.lab.stepper import Stepper
from schatten.lab.store import Store, replace_folder

# Steps between log records and looks at the loss; each look waits for the device.
LOG_EVERY = 10

# Windows evaluated at once.
EVAL_BATCH = 64


@dataclass
class Progress:
    """What a run has done so far; `seconds` are of training steps alone, `optimizer_seconds` the part in step()."""

    step: int = 0
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    train_loss: float = float("nan")
    validation_loss: float = float("nan")

    def optimizer_share(self) -> float:
        return self.optimizer_seconds / self.seconds if self.seconds else 0.0


Report = Callable[[Progress], None]


def model_config(config: CompareConfig, vocabulary: int) -> GPTConfig:
    return GPTConfig(
        vocabulary, config.context, config.layers, config.heads, config.width, qk_norm=config.qk_norm, dropout=config.dropout
    )


class Trainer:
    """A run with everything that changes while it trains."""

    def __init__(self, config: CompareConfig, corpus: Corpus, run: Run, store: Store) -> None:
        self.config, self.corpus, self.run, self.store = config, corpus, run, store
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            log_with=list(config.trackers) or None,
            project_dir=store.tensorboard,
        )
        set_seed(run.seed)  # equal initial weights for every optimizer of this seed
        model = GPT(model_config(config, corpus.vocabulary))
        # The optimizer is built on the model as it is trained, and so finds where its directions are to be computed.
        self.model = sharding.shard(model, self.accelerator) if config.fsdp else self.accelerator.prepare(model)
        betas = (config.beta1, config.beta2)
        self.own = optimizers.build(run.optimizer, self.model, lr=run.lr, weight_decay=config.weight_decay, betas=betas)
        for group in self.own.param_groups:
            group["initial_lr"] = group["lr"]
        self.bounds = optimizers.bounds(self.own)
        self.evaluates = optimizers.evaluates(run.optimizer)
        # A sharded model is on its device; accelerate would copy the state of its optimizer there once more.
        self.optimizer = self.accelerator.prepare(self.own, device_placement=[not config.fsdp])
        self.stepper = Stepper(self.accelerator, self.model, self.optimizer, self.model, config.clip)
        self.progress = Progress()
        self.losses: list[Tensor] = []  # of the steps since the last log record
        self.instruments = self._instruments() if config.instruments and run.seed == 0 else None

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def train(self, report: Report) -> float:
        """Train to the last step and return the final validation loss; a diverged run returns inf."""
        self._resume()
        if self.is_main and self.config.trackers:
            plain = {k: v for k, v in self.config.plain().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers(self.run.id, {**plain, "optimizer": self.run.optimizer, "lr": self.run.lr})
        diverged = False
        while self.progress.step < self.config.steps and not diverged:
            self.losses.append(self._step())
            step = self.progress.step
            last = step == self.config.steps
            if step % LOG_EVERY == 0 or last:
                diverged = not self._log()
                report(self.progress)
            if not diverged and (last or step % self.config.eval_every == 0):
                diverged = not self._evaluate(self.config.final_eval_windows if last else self.config.eval_windows)
            if not diverged and (last or step % self.config.save_every == 0):
                self._save()
        self._finish(diverged)
        report(self.progress)
        return float("inf") if diverged else self.progress.validation_loss

    # -- a step ----------------------------------------------------------------------------------------------------

    def _step(self) -> Tensor:
        step, stepper = self.progress.step, self.stepper
        stepper.set_lr(self.config.lr_factor(step))
        pieces = self._micro_batches(step)
        start, optimizing = time.perf_counter(), stepper.seconds
        loss = stepper.step_with_closure(pieces[0]) if self.evaluates else stepper.step(pieces)
        measuring = self.instruments.seconds() if self.instruments else 0.0
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - start - measuring
        self.progress.optimizer_seconds += stepper.seconds - optimizing - measuring
        return loss

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self.accelerator.autocast():  # a sharded model is not accelerate's to wrap
            return self.model(ids, targets)

    def _micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's share of the step's batch, in `accumulate` pieces."""
        size = self.config.batch * self.config.accumulate
        ids, targets = batch(self.corpus.train, self.config.context, size, seed=self.run.seed, step=step)
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        pieces = zip(ids.chunk(self.config.accumulate), targets.chunk(self.config.accumulate), strict=True)
        return [(x[rank::world].to(device), y[rank::world].to(device)) for x, y in pieces]

    def _instruments(self) -> Instruments:
        assert self.config.instruments_every is not None
        # Batches that no step sees, the same for every optimizer.
        unseen = range(self.config.steps, self.config.steps + batches(self.config.instruments))
        return Instruments(
            self.config.instruments,
            self.config.instruments_every,
            self.own,
            model=self.model,
            losses=[self._fixed_loss(step) for step in unseen],
            step=lambda: self.progress.step,
            write=self._record_matrix,
        )

    def _fixed_loss(self, step: int) -> Callable[[], Tensor]:
        ids, targets = self._micro_batches(step)[0]
        return lambda: self._loss(ids, targets)

    # -- what is recorded ------------------------------------------------------------------------------------------

    def _log(self) -> bool:
        mean = self.stepper.mean(torch.stack(self.losses).mean())
        self.losses.clear()
        self.progress.train_loss = float(mean)
        self._record("train", loss=self.progress.train_loss, lr=self.optimizer.param_groups[0]["lr"])
        return bool(mean.isfinite())

    def _evaluate(self, windows: int) -> bool:
        """Mean loss over `windows` fixed windows of the validation part; every process takes its share of each batch."""
        ids, targets = validation_windows(self.corpus.validation, self.config.context, windows)
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        total = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else torch.float32)
        count = torch.zeros_like(total)
        self.model.eval()
        with torch.no_grad():
            # Equally often on every process: each evaluation of a sharded model gathers its weights from all of them.
            for start in range(0, len(ids), world * EVAL_BATCH):
                x, y = (part[start : start + world * EVAL_BATCH][rank::world] for part in (ids, targets))
                if len(x):
                    total += self._loss(x.to(device), y.to(device)) * len(x)
                    count += len(x)
                else:  # not counted
                    self._loss(ids[:1].to(device), targets[:1].to(device))
        self.model.train()
        both = self.accelerator.reduce(torch.stack([total, count]), "sum")
        assert isinstance(both, Tensor)
        self.progress.validation_loss = float(both[0] / both[1])
        self._record("eval", loss=self.progress.validation_loss, windows=len(ids))
        return bool(both.isfinite().all())

    def _record(self, event: str, **values: Any) -> None:
        if self.is_main:
            p = self.progress
            times = {"step": p.step, "seconds": p.seconds, "optimizer_seconds": p.optimizer_seconds}
            self.store.append({"run": self.run.id, "event": event, **times, **values})
            if self.config.trackers and event != "done":
                self.accelerator.log({f"{event}/{name}": value for name, value in values.items()}, step=p.step)

    def _record_matrix(self, record: Mapping[str, Any]) -> None:
        if self.is_main:
            p, values = self.progress, {key: value for key, value in record.items() if key not in ("step", "name")}
            times = {"step": p.step + 1, "seconds": p.seconds, "optimizer_seconds": p.optimizer_seconds}
            self.store.append({"run": self.run.id, "event": "instruments", **times, "matrix": record["name"], **values})

    def _finish(self, diverged: bool) -> None:
        loss = float("inf") if diverged else self.progress.validation_loss
        self.progress.validation_loss = loss
        parameters = sum(p.numel() for p in self.model.parameters())
        run = {"optimizer": self.run.optimizer, "lr": self.run.lr, "seed": self.run.seed}
        self._record("done", loss=loss, parameters=parameters, bounds=self.bounds, **run)
        # Not end_training(), which would also end the process group that the next run needs.
        for tracker in self.accelerator.trackers:
            tracker.finish()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        target = self.store.checkpoint(self.run.id)
        partial = target.with_name(target.name + ".partial")
        if self.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.config.fsdp:
            sharding.save(partial, self.accelerator, self.model, self.own)
        else:
            self.accelerator.save_state(str(partial), safe_serialization=True)
        losses = self._losses_of_all()
        self.accelerator.wait_for_everyone()  # until all have written
        if self.is_main:
            saved = {"progress": vars(self.progress), "losses": losses}
            (partial / "progress.json").write_text(json.dumps(saved))
            replace_folder(partial, target)
        self.accelerator.wait_for_everyone()

    def _losses_of_all(self) -> list[list[float]]:
        """The losses since the last log record, of each process: averaged before, a resumed record would round otherwise."""
        if not self.losses:
            return [[] for _ in range(self.accelerator.num_processes)]
        rows = self.accelerator.gather(torch.stack(self.losses)[None])
        assert isinstance(rows, Tensor)
        return rows.tolist()

    def _resume(self) -> None:
        folder = newest(self.store.checkpoint(self.run.id))
        if folder is not None:
            if self.config.fsdp:
                sharding.load(folder, self.accelerator, self.model, self.own)
            else:
                self.accelerator.load_state(str(folder))
            saved = json.loads((folder / "progress.json").read_text())
            self.progress = Progress(**saved["progress"])
            own = saved["losses"][self.accelerator.process_index]
            self.losses = [torch.tensor(loss, device=self.accelerator.device) for loss in own]
        if self.is_main:
            self.store.rewind(self.run.id, self.progress.step)
        self.accelerator.wait_for_everyone()


def newest(target: Path) -> Path | None:
    """The last complete checkpoint at `target`: itself, or the one it was about to replace."""
    candidates = (target, target.with_name(target.name + ".old"))
    return next((folder for folder in candidates if (folder / "progress.json").exists()), None)
