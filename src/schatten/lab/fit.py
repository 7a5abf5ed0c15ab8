"""Train a task with an optimizer: the one loop of all experiments and sweeps, on accelerate.

Devices, processes, mixed precision and accumulation are accelerate's; a run is a function of task, optimizer, loop and seed.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn

from schatten.lab.schedule import lr_factor
from schatten.lab.stepper import Stepper
from schatten.lab.store import decoded, encoded, replace_folder
from schatten.lab.tasks import Task

Build = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Loop:
    """How long and how: `batch` examples of each step over all processes, in `accumulate` pieces.

    The lr of every group is its own peak times `schedule` (`lab.schedule`); `clip` is the global gradient norm, 0 is off;
    an evaluation every `eval_every` steps and at the end, a checkpoint every `save_every` (0: never).
    """

    steps: int
    batch: int
    warmup: int = 0
    schedule: str = "cosine"
    final_lr: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    mixed_precision: str = "no"
    eval_every: int = 0
    save_every: int = 0


@dataclass
class Fit:
    """What a run found. `loss` is the final validation loss, inf of a diverged run; `seconds` are of training steps alone.

    `curve` has (step, validation loss), `train` (step, training loss) of every step, `scores` the last evaluation.
    """

    loss: float = math.inf
    steps: int = 0
    seconds: float = 0.0
    optimizer_seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    train: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False

    @property
    def best(self) -> float:
        """The lowest validation loss of all evaluations."""
        return min((loss for _, loss in self.curve), default=math.inf)

    def steps_to(self, target: float) -> float:
        """The first evaluated step whose validation loss is at most `target`; inf where there is none."""
        return next((float(step) for step, loss in self.curve if loss <= target), math.inf)

    def tail(self, share: float = 0.1) -> float:
        """Mean training loss of the last `share` of the steps; inf of a diverged run."""
        last = [loss for _, loss in self.train[-max(1, round(share * len(self.train))) :]]
        return math.inf if self.diverged or not last else sum(last) / len(last)


def fit(
    task: Task,
    build: Build,
    loop: Loop,
    *,
    seed: int = 0,
    closure: bool = False,
    start: Callable[[nn.Module], None] | None = None,
    watch: Callable[[int, nn.Module, torch.optim.Optimizer], None] | None = None,
    report: Callable[[int, float], bool | None] | None = None,
    folder: Path | None = None,
) -> Fit:
    """Train `task` from the weights and on the batches of `seed`.

    Args:
        build: the optimizer of the model; its groups' lr are their peaks.
        closure: the optimizer evaluates the loss itself, through the closure given to `step`.
        start: changes the fresh weights before the optimizer is built (a pretrained start).
        watch: called before the first step and after every step, with the number of steps done.
        report: called with every evaluation (step, loss); True ends the run there.
        folder: where checkpoints are kept; a run whose folder holds one goes on from it, bit for bit.

    A loss that is not finite ends the run with `diverged`. Raises ValueError for a closure with `accumulate` above 1, and
    for an `accumulate` that does not divide `batch`, whose pieces would weigh unequally.
    """
    if loop.batch % loop.accumulate:
        raise ValueError(f"accumulate must divide batch, got {loop.accumulate} and {loop.batch}.")
    if closure and loop.accumulate > 1:
        raise ValueError(f"closure=True evaluates a whole batch at once and needs accumulate=1, got {loop.accumulate}.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != loop.mixed_precision:
        # accelerate holds one precision for a process and refuses another, but no run outlives this function.
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=loop.mixed_precision,
        gradient_accumulation_steps=loop.accumulate,
    )
    set_seed(seed)
    plain = task.model()
    if start is not None:
        start(plain)
    model = accelerator.prepare(plain)
    own = build(model)
    for group in own.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer = accelerator.prepare(own)
    stepper = Stepper(accelerator, model, optimizer, partial(task.loss, model), loop.clip)
    run = _Run(task, loop, seed, stepper, Fit())
    if folder is not None:
        run.resume(folder)
    if watch is not None and run.found.steps == 0:
        watch(0, model, own)
    stopped = False
    while run.found.steps < loop.steps and not run.found.diverged and not stopped:
        loss = run.step(closure)
        run.found.train.append((run.found.steps, loss))
        if not math.isfinite(loss):
            # An evaluation before it may have been finite.
            run.found.diverged, run.found.loss = True, math.inf
        if watch is not None:
            watch(run.found.steps, model, own)
        last = run.found.steps == loop.steps
        if not run.found.diverged and (last or (loop.eval_every and run.found.steps % loop.eval_every == 0)):
            stopped = run.evaluate(report)
        if folder is not None and loop.save_every and not last and run.found.steps % loop.save_every == 0:
            run.save(folder)
    if folder is not None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    return run.found


@dataclass
class _Run:
    task: Task
    loop: Loop
    seed: int
    stepper: Stepper
    found: Fit

    @property
    def accelerator(self) -> Accelerator:
        return self.stepper.accelerator

    def step(self, closure: bool) -> float:
        loop, stepper = self.loop, self.stepper
        stepper.set_lr(lr_factor(loop.schedule, self.found.steps, loop.steps, warmup=loop.warmup, final=loop.final_lr))
        pieces = self._pieces()
        start, optimizing = time.perf_counter(), stepper.seconds
        loss = stepper.step_with_closure(pieces[0]) if closure else stepper.mean(stepper.step(pieces))
        value = float(loss)
        self.found.steps += 1
        self.found.seconds += time.perf_counter() - start
        self.found.optimizer_seconds += stepper.seconds - optimizing
        return value

    def evaluate(self, report: Callable[[int, float], bool | None] | None) -> bool:
        model = self.stepper.model
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            self.found.scores = self.task.evaluate(model, self.accelerator.device)
        model.train()
        loss = self.found.scores["loss"]
        self.found.loss = loss if math.isfinite(loss) else math.inf
        self.found.diverged = not math.isfinite(loss)
        self.found.curve.append((self.found.steps, self.found.loss))
        return bool(report(self.found.steps, self.found.loss)) if report is not None else False

    def save(self, folder: Path) -> None:
        partial = folder.with_name(folder.name + ".partial")
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial), safe_serialization=True)
        if self.accelerator.is_main_process:
            (partial / "fit.json").write_text(json.dumps(encoded(dataclasses.asdict(self.found))))
            replace_folder(partial, folder)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path) -> None:
        # A kill between the two renames of a replacement leaves the earlier checkpoint as .old.
        kept = next((f for f in (folder, folder.with_name(folder.name + ".old")) if (f / "fit.json").exists()), None)
        if kept is not None:
            self.accelerator.load_state(str(kept))
            saved = decoded(json.loads((kept / "fit.json").read_text()))
            pairs = {name: [(int(step), float(loss)) for step, loss in saved[name]] for name in ("curve", "train")}
            self.found = Fit(**{**saved, **pairs})

    def _pieces(self) -> list[tuple[Tensor, ...]]:
        whole = self.task.batch(self.loop.batch, seed=self.seed, step=self.found.steps)
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        split = zip(*(part.chunk(self.loop.accumulate) for part in whole), strict=True)
        return [tuple(part[rank::world].to(device) for part in piece) for piece in split]
