"""`schatten sweep`: its flags, and what it prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from schatten.lab.errors import InputError
from schatten.lab.lab_commands import console

if TYPE_CHECKING:
    from schatten.lab.sweep_study import Study

TOP = 5


def command(
    space: Annotated[
        list[str] | None,
        typer.Option(help="NAME=LOW:HIGH (logarithmic), NAME=lin:LOW:HIGH or NAME=A,B,C; repeatable. Names: see --names."),
    ] = None,
    optimizer: Annotated[str, typer.Option(help="One of `schatten optimizers`.")] = "muon",
    names: Annotated[bool, typer.Option("--names", help="Show what --space can name for --optimizer, and exit.")] = False,
    task: Annotated[str, typer.Option(help="digits: a multilayer perceptron on images; gpt: a GPT on text.")] = "digits",
    data: Annotated[str, typer.Option(help="Images or text as the laboratory reads them. Default digits, or pydoc.")] = "",
    tokens: Annotated[str, typer.Option(help="byte, char, or bpe:N, for text.")] = "byte",
    trials: Annotated[int | None, typer.Option(help="Trials of the study, whoever runs them. Default 60, or a grid's.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random or grid.")] = "tpe",
    pruner: Annotated[
        str, typer.Option(help="halving: stop the worse two thirds after 1/9 and 1/3 of --steps; none.")
    ] = "none",
    steps: Annotated[int, typer.Option(help="Optimizer steps of a training.")] = 200,
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. N-1 of each trial, whose mean loss counts.")] = 1,
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = 32,
    layers: Annotated[int, typer.Option(help="Hidden layers, or blocks of the GPT.")] = 2,
    width: Annotated[int, typer.Option(help="Their width.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of a window of text.")] = 64,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 0,
    clip: Annotated[float, typer.Option(help="Global gradient norm to clip at; 0 is off.")] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0 is a tenth of --steps.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    jobs: Annotated[int, typer.Option(help="Worker processes on this machine, each with one thread.")] = 1,
    storage: Annotated[
        str, typer.Option(help="URL of a database that several machines share; default study.db in --out.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the study in it; default TASK-OPTIMIZER.")] = "",
    out: Annotated[Path, typer.Option(help="Run folder: database, report.html and its pictures.")] = Path("runs/sweep"),
    grace: Annotated[float, typer.Option(help="Seconds without a sign of life after which a worker counts as dead.")] = 60.0,
) -> None:
    """Search an optimizer's hyper-parameters on a task: an Optuna study that any number of workers and machines share.

    The same command continues a study that was interrupted, joins one that is running, and shows one that is finished.
    """
    from schatten.lab import sweep_space

    if names:
        for known in sweep_space.known(optimizer):
            console().print(known, highlight=False)
        return
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}.")
    if not grace >= 1:
        raise InputError(f"--grace must be at least 1 second, got {grace:g}.")
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise InputError(f"--out {out} is a file or in one: name a folder.")
    from schatten.lab.sweep import Sweep

    settings = Sweep(
        space=sweep_space.parse(space or ()),
        optimizer=optimizer,
        task=task,
        data=data,
        tokens=tokens,
        trials=trials,
        sampler=sampler,
        pruner=pruner,
        steps=steps,
        seeds=seeds,
        batch=batch,
        layers=layers,
        width=width,
        context=context,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        mixed_precision=mixed_precision,
        eval_every=eval_every,
        seed=seed,
    )
    from schatten.lab import sweep_study, sweep_worker
    from schatten.lab.sweep import Objective

    objective = Objective.load(settings)
    out.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{out.absolute()}/study.db"
    title = name or f"{task}-{optimizer}"
    assert settings.trials is not None
    points = sweep_worker.points(settings)
    sweep_study.create(url, title, settings.plain(objective.fingerprint), settings.trials, points)
    study = sweep_study.Study(url, title, grace=grace)
    from optuna.exceptions import StorageInternalError

    try:
        if not study.finished():
            if jobs == 1:
                sweep_worker.work(study, settings, objective, say=_say)
            else:
                sweep_worker.pool(study, settings, jobs, _say)
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command continues; the trials in progress were given back", err=True)
        raise
    except (StorageInternalError, sweep_worker.Unfinished) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"study {title} is not finished ({cause}): the same command continues.") from None
    show(study, out)


def show(study: "Study", out: Path) -> None:
    """The best trials as a table, and the report."""
    from schatten.lab.sweep_report import verdict, write_report
    from schatten.lab.sweep_results import results, summary

    found, space = results(study.slots()), study.settings["space"]
    table = Table(title=study.name)
    for column in ("trial", *space, "loss", ""):
        table.add_column(column, justify="right")
    for r in found[:TOP]:
        table.add_row(str(r.slot), *(f"{r.params[n]:.4g}" if n in r.params else "" for n in space), f"{r.loss:.5g}", r.state)
    console().print(table)
    for line in (summary(found, study.count), verdict(found, space), f"report: {write_report(study, out)}"):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def _say(line: str) -> None:
    print(line, flush=True)
