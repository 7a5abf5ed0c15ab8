"""`schatten lab`: list the experiments, run one or all, write the table of what was reproduced.

The flags of an experiment are the fields of its Config, so a new experiment needs no line here.
"""

import dataclasses
import inspect
import os
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from schatten.lab import experiments
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, Verdict
from schatten.lab.ledger import Ledger

app = typer.Typer(no_args_is_help=True, help="Published experiments, run anew beside what was published.")

RUNS = Path("runs/lab")

# Output for a file or a pipe has no width of its own; tables need this much.
PLAIN_WIDTH = 120


@app.command("list")
def list_experiments() -> None:
    """List the experiments, one line each."""
    for name in experiments.names():
        line = f"{name:22} {experiments.claim(name)} ({experiments.load(name).source})"
        console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def run(context: typer.Context) -> None:
    """Run a published experiment, or `--all`: `schatten lab run NAME --help` shows its settings."""
    arguments = list(context.args)
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    command = _all_app() if name is None else _one_app(name)
    command(arguments[name is not None :], prog_name=f"schatten lab run {name or ''}".strip())


@app.command("report")
def report(
    runs: Annotated[Path, typer.Option(help="Folder of the experiments' folders.")] = RUNS,
    out: Annotated[Path, typer.Option(help="The page; its pictures lie in images/ beside it.")] = Path("docs/reproduction.md"),
) -> None:
    """Write the reproduction page from the rows that are there, without measuring."""
    from schatten.lab.reproduction import write_page

    console().print(f"page: {write_page(runs, out)}")


def run_one(name: str, config: Any, out: Path, console: Console, *, again: bool = False) -> list[Verdict]:
    """Measure what of the experiment is not in `out`/NAME yet, show its verdicts and return them."""
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise InputError(f"--out {out} is a file or in one: name a folder.")
    experiment = experiments.load(name)
    folder = out / name
    ledger = Ledger(folder, dataclasses.asdict(config), console, again=again)
    console.quiet = not ledger.state.is_main_process
    console.print(f"{name}: {experiments.claim(name)}", highlight=False)
    experiment.run(config, ledger)
    verdicts = experiment.check(ledger.rows)
    console.print(verdict_table(name, verdicts))
    console.print(f"rows: {folder / 'rows.jsonl'}")
    if ledger.state.num_processes > 1:
        ledger.state.wait_for_everyone()
        ledger.state.destroy_process_group()
    return verdicts


def run_all(names: Sequence[str], flags: Sequence[str], jobs: int, console: Console) -> list[str]:
    """Run the experiments `jobs` at once, each as a command of its own, and return those that failed."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}

    def one(name: str) -> bool:
        start = time.perf_counter()
        command = [sys.executable, "-m", "schatten", "lab", "run", name, *flags]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        failed = ended.returncode != 0
        # Of a finished experiment the table is enough; of a failed one all that it said.
        said = ended.stdout + ended.stderr if failed else ended.stdout[ended.stdout.rfind(f" {name} ") :].lstrip()
        word = f"failed, exit code {ended.returncode}" if failed else "finished"
        console.print(f"{name}: {word} after {time.perf_counter() - start:.0f} s", highlight=False)
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        return failed

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(one, names))
    return [name for name, failed in zip(names, outcomes, strict=True) if failed]


def verdict_table(name: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=name, show_lines=True)
    for column in ("quantity", "published", "ours", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for v in verdicts:
        table.add_row(v.quantity, v.published, v.ours, v.verdict, v.why)
    return table


def console() -> Console:
    """The terminal, or a plain stream wide enough for tables."""
    standard = Console()
    return standard if standard.is_terminal else Console(width=PLAIN_WIDTH)


# -- flags from a Config -----------------------------------------------------------------------------------------------

_FULL = Annotated[bool, typer.Option("--full/--quick", help="The published size, or what fits a laptop.")]
_OUT = Annotated[Path, typer.Option(help="Folder for NAME/rows.jsonl.")]
_AGAIN = Annotated[bool, typer.Option("--again", help="Measure anew instead of going on with the rows that are there.")]


def _one_app(name: str) -> typer.Typer:
    """A command whose options are the fields of the experiment's Config."""
    experiment = experiments.load(name)
    fields = dataclasses.fields(experiment.quick)

    def command(*, full: bool, out: Path, again: bool, **given: Any) -> None:
        values = {field.name: _value(field, experiment, given[field.name]) for field in fields}
        run_one(name, configured(experiment, full, values), out, console(), again=again)

    kinds: dict[str, Any] = {"full": _FULL, "out": _OUT, "again": _AGAIN}
    kinds |= {field.name: _annotation(field, experiment) for field in fields}
    defaults = {"full": False, "out": RUNS, "again": False}
    parameter = inspect.Parameter
    command.__annotations__ = kinds
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter(key, parameter.KEYWORD_ONLY, default=defaults.get(key), annotation=kind) for key, kind in kinds.items()]
    )
    return _app(command, experiments.text(name))


def configured(experiment: Experiment, full: bool, given: dict[str, Any]) -> Any:
    """The quick or the full configuration with the fields that were given replaced."""
    base = experiment.full if full else experiment.quick
    config = dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})
    if config.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {config.seeds}.")
    return config


def _annotation(field: dataclasses.Field, experiment: Experiment) -> Any:
    quick, full = getattr(experiment.quick, field.name), getattr(experiment.full, field.name)
    shown = _shown(quick) if quick == full else f"{_shown(quick)}, with --full {_shown(full)}"
    text = f"{field.metadata.get('help', 'Seeds 0 .. N-1.')} Default {shown}."
    kind = _kind(field, experiment)
    flag = f"--{field.name.replace('_', '-')}"
    names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
    return Annotated[(str if typing.get_origin(kind) is tuple else kind) | None, typer.Option(*names, help=text)]


def _kind(field: dataclasses.Field, experiment: Experiment) -> Any:
    kind = typing.get_type_hints(type(experiment.quick))[field.name]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _value(field: dataclasses.Field, experiment: Experiment, given: Any) -> Any:
    kind = _kind(field, experiment)
    if given is None or typing.get_origin(kind) is not tuple:
        return given
    entry = typing.get_args(kind)[0]
    try:
        return tuple(entry(part.strip()) for part in given.split(",") if part.strip())
    except ValueError:
        flag = field.name.replace("_", "-")
        raise InputError(f"--{flag} takes {entry.__name__} values separated by commas, got {given!r}.") from None


def _shown(value: Any) -> str:
    return ",".join(f"{v}" for v in value) if isinstance(value, tuple) else f"{value}"


def _all_app() -> typer.Typer:
    def command(
        every: Annotated[bool, typer.Option("--all", help="Every experiment, each in a process of its own.")] = False,
        full: _FULL = False,
        out: _OUT = RUNS,
        again: _AGAIN = False,
        seeds: Annotated[int | None, typer.Option(help="Seeds 0 .. N-1 instead of each experiment's own.")] = None,
        jobs: Annotated[int, typer.Option(help="Experiments at once; they share the cores.")] = 1,
    ) -> None:
        if not every:
            raise InputError(f"NAME is missing: name an experiment ({', '.join(experiments.names())}) or --all.")
        if jobs < 1:
            raise InputError(f"--jobs must be at least 1, got {jobs}.")
        flags = [*(["--full"] if full else []), *(["--again"] if again else []), "--out", str(out)]
        flags += ["--seeds", str(seeds)] if seeds is not None else []
        if failed := run_all(experiments.names(), flags, jobs, console()):
            raise InputError(f"{', '.join(failed)} did not finish: the same command goes on with the rows that are there.")

    return _app(command, "Run every experiment with `--all`, or one: NAME --help shows its settings.")


def _app(command: Callable[..., None], text: str) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(help=text)(command)
    return app
