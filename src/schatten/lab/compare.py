"""The comparison: every optimizer, learning rate and seed from equal weights on equal batches, then a table and a report."""

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from schatten.lab import data
from schatten.lab.config import CompareConfig
from schatten.lab.errors import InputError
from schatten.lab.models import GPT
from schatten.lab.store import Store
from schatten.lab.train import Progress as RunProgress
from schatten.lab.train import Trainer, model_config


@dataclass(frozen=True)
class Setting:
    """An optimizer at one lr over all seeds; `spread` is the standard deviation, nan for one seed."""

    optimizer: str
    lr: float
    losses: tuple[float, ...]
    seconds: float
    optimizer_share: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float:
        if len(self.losses) < 2 or self.mean == float("inf"):
            return float("nan")
        return statistics.stdev(self.losses)

    @property
    def diverged(self) -> int:
        return sum(loss == float("inf") for loss in self.losses)


def compare(config: CompareConfig, out: Path, *, resume: bool = False, console: Console | None = None) -> list[Setting]:
    """Run what of `config` is not finished in `out`, write the report there, and return one `Setting` per optimizer and lr."""
    from schatten.lab.report import write_report

    # The processes of `accelerate launch` or torchrun, one otherwise. Without an accelerator accelerate must be told so, or
    # it takes torchrun's processes for separate ones.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if config.batch % state.num_processes:
        raise InputError(f"--batch must be a multiple of the {state.num_processes} processes, got {config.batch}.")
    if config.fsdp and state.num_processes == 1:
        raise InputError(
            "--fsdp shards each model over processes, got one: start torchrun --nproc-per-node 2 -m schatten compare."
        )
    if state.num_processes > 1 and "ef21muon" in config.optimizers:
        raise InputError("--optimizers ef21muon compresses each process's own gradient, which DDP averages: use one process.")
    console = console or Console()
    console.quiet = not state.is_main_process
    corpus = data.load(config.data, config.tokens, config.context)
    store = Store(out)
    saved = {**config.plain(), "fingerprint": corpus.fingerprint, "processes": state.num_processes, "versions": versions()}
    sizes = model_config(config, corpus.vocabulary)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(sizes).parameters())
    if state.is_main_process:
        # Weights and two averages in fp32, for every run, and once more for the save in progress.
        store.open(saved, resume=resume, checkpoint_bytes=12 * parameters * (len(config.runs()) + 1))
    state.wait_for_everyone()
    console.print(
        f"{len(config.runs())} runs of {config.steps} steps: GPT of {parameters:,} parameters, "
        f"{config.tokens} tokens of {corpus.source} ({len(corpus.train):,} to train, "
        f"{len(corpus.validation):,} to validate, vocabulary {corpus.vocabulary})"
    )
    finished = store.results()
    with _bars(console) as bars:
        for run in config.runs():
            if run.id in finished:
                console.print(f"{run.id}: finished before, validation loss {finished[run.id]['loss']:.4f}")
                continue
            task = bars.add_task(run.id, total=config.steps, status="")

            def show(progress: RunProgress, task: Any = task) -> None:
                bars.update(task, completed=progress.step, status=_status(progress, config))

            trainer = Trainer(config, corpus, run, store)
            loss = trainer.train(show)
            bars.remove_task(task)
            console.print(f"{run.id}: {_status(trainer.progress, config)}, validation loss {loss:.4f}")
    settings = summarise(list(store.results().values()))
    if state.is_main_process:
        report = write_report(out)
        console.print(table(settings))
        console.print(f"report: {report}")
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()
    return settings


def summarise(results: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """`done` records by optimizer and lr, each with its losses in the order of seeds."""
    grouped: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for result in sorted(results, key=lambda r: r["seed"]):
        grouped.setdefault((result["optimizer"], result["lr"]), []).append(result)
    return [
        Setting(
            optimizer,
            lr,
            tuple(r["loss"] for r in rows),
            statistics.fmean(r["seconds"] for r in rows),
            sum(r["optimizer_seconds"] for r in rows) / max(1e-9, sum(r["seconds"] for r in rows)),
        )
        for (optimizer, lr), rows in grouped.items()
    ]


def best(settings: Sequence[Setting]) -> dict[str, Setting]:
    """The setting of lowest mean loss of each optimizer; one with a diverged seed counts as infinite."""
    chosen: dict[str, Setting] = {}
    for setting in settings:
        if setting.optimizer not in chosen or setting.mean < chosen[setting.optimizer].mean:
            chosen[setting.optimizer] = setting
    return chosen


def table(settings: Sequence[Setting]) -> Table:
    """The comparison as a table, the best lr of each optimizer marked."""
    chosen = best(settings)
    result = Table(title="validation loss in nats per token")
    for column in ("optimizer", "lr", "loss", "spread", "seeds", "seconds", "in optimizer", ""):
        result.add_column(column, justify="left" if column in ("optimizer", "") else "right", no_wrap=True)
    tried = Counter(s.optimizer for s in settings)
    for s in settings:
        mark = "best" if tried[s.optimizer] > 1 and chosen[s.optimizer] is s and s.mean < float("inf") else ""
        notes = ", ".join(filter(None, (mark, f"{s.diverged} diverged" if s.diverged else "")))
        spread = "-" if s.spread != s.spread else f"{s.spread:.4f}"
        cells = (s.optimizer, f"{s.lr:g}", f"{s.mean:.4f}", spread, str(len(s.losses)), f"{s.seconds:.1f}")
        result.add_row(*cells, f"{100 * s.optimizer_share:.0f} %", notes, style="bold" if mark else None)
    return result


def versions() -> dict[str, str]:
    names = ("schatten", "torch", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    # Without a terminal a bar is noise in a file: there each run is one line when it ends.
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _status(progress: RunProgress, config: CompareConfig) -> str:
    tokens = progress.step * config.batch * config.accumulate * config.context
    rate = tokens / progress.seconds if progress.seconds else 0.0
    return f"loss {progress.train_loss:.3f}, {rate:,.0f} tokens/s, {100 * progress.optimizer_share():.0f} % in optimizer"
