"""`schatten diagnose`: the spectra of a checkpoint's matrices, the ball they fit, and what changed to another checkpoint."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from schatten.lab.errors import InputError


def diagnose(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A safetensors or torch file, an index of shards, or a folder.")
    ],
    against: Annotated[Path | None, typer.Option(help="A second checkpoint: show what changed from the first to it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, its pictures and data.json.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of a table, the most notable first; 0 for all.")] = 20,
    max_size: Annotated[
        int,
        typer.Option(help="Of matrices with both sides above this only norm and stable rank, by Krylov iteration."),
    ] = 4096,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --max-size 512.")] = False,
    top: Annotated[int, typer.Option(help="With --against: leading singular vectors whose subspaces are compared.")] = 8,
    device: Annotated[str, typer.Option(help="Where matrices are measured, one after the other: cpu, cuda.")] = "cpu",
) -> None:
    """Show spectra, spectral norms and stable ranks of the matrices in a checkpoint, and what ball they fit.

    The file is mapped and read one matrix at a time, and never unpickled into code. `docs/diagnose.md` explains the columns.
    """
    from schatten.lab.checkpoint_reader import open_checkpoint
    from schatten.lab.commands import console
    from schatten.lab.diagnose import diagnose as measured
    from schatten.lab.diagnose_changes import compare
    from schatten.lab.diagnose_table import show

    for name, value, least in (("--limit", limit, 0), ("--max-size", max_size, 1), ("--top", top, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}.")
    _check_outputs(out, as_json)
    _check_device(device)
    size = min(max_size, 512) if quick else max_size
    first = open_checkpoint(checkpoint)
    second = open_checkpoint(against) if against is not None else None
    for note in first.notes:
        console().print(note, highlight=False, markup=False)
    for name, other in sorted(first.tied.items()):
        console().print(f"{name} is {other}, and counted once", highlight=False, markup=False)
    entries = sum(math.prod(t.shape) for t in first.tensors.values())
    with _progress("measuring", entries) as advance:
        found = measured(first, max_size=size, device=device, progress=advance)
    compared = None
    if second is not None:
        with _progress("comparing", entries) as advance:
            compared = compare(first, second, max_size=size, device=device, top=top, progress=advance)
    show(found, compared, console(), limit)
    if out is None and as_json is None:
        return
    from schatten.lab.diagnose_report import content, write_report

    if as_json is not None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(content(checkpoint, found, first.notes, compared, against), indent=1) + "\n")
    if out is not None:
        console().print(f"report: {write_report(out, checkpoint, found, first.notes, compared, against)}", soft_wrap=True)


def _check_outputs(out: Path | None, as_json: Path | None) -> None:
    if as_json is not None and as_json.is_dir():
        raise InputError(f"--json {as_json} is a folder: name a file.")
    if out is not None and any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise InputError(f"--out {out} is a file or in one: name a folder.")


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"--device {device!r} cannot be used with fp64 here: {first}") from None


@contextmanager
def _progress(what: str, entries: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on standard error where that is a terminal."""
    terminal = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[name]}"))
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task(what, total=max(entries, 1), name="")
        yield lambda name, count: bar.update(task, advance=count, name=name)
