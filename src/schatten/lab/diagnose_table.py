"""The tables of a diagnosis, the same for a terminal and for the report: what the columns are, and a row's cells."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schatten.lab.diagnose import Diagnosis
from schatten.lab.diagnose_balls import Ball
from schatten.lab.diagnose_changes import Change, Comparison
from schatten.lab.diagnose_rows import SCALES, Row

MATRIX_HEAD = ("matrix", "kind", "size", "dtype", "norm", "median", "stable", "effective", "RMS", "cond.", "peak", "by")
BALL_HEAD = ("kind", "matrices", "R", "median norm", "median stable", *(f"λ, {scale}" for scale in SCALES))
CHANGE_HEAD = ("matrix", "size", "change", "in norm", "stable", "effective", "cos", "top", "left", "right", "angle", "gap")


def matrix_cells(row: Row) -> tuple[str, ...]:
    """A matrix; `krylov` with its relative error, unless that is below the digits shown."""
    if row.nonfinite:
        return (row.name, row.kind, size(row), short(row.dtype), "nan", *("-",) * 6, row.method)
    method = f"{row.method} ±{row.residual:.0e}" if row.residual > 5e-4 else row.method
    condition = (">" if row.condition_bound and row.sigma_max > 0 else "") + number(row.condition)
    numbers = (row.sigma_max, row.sigma_median, row.stable_rank, row.effective_rank, row.rms)
    return (row.name, row.kind, size(row), short(row.dtype), *map(number, numbers), condition, number(row.peak), method)


def ball_cells(ball: Ball) -> tuple[str, ...]:
    numbers = (ball.radius, ball.median_sigma, ball.median_stable_rank, *(ball.weight_decay[scale] for scale in SCALES))
    return (ball.kind, f"{ball.matrices:,}", *map(number, numbers))


def change_cells(change: Change) -> tuple[str, ...]:
    if change.nonfinite:
        return (change.name, size(change), "nan", *("-",) * 9)
    ranks = (change.stable_rank, change.effective_rank)
    subspaces = (number(change.left), number(change.right), number(change.angle), number(change.gap))
    shares = (percent(change.relative), percent(change.relative_spectral))
    return (change.name, size(change), *shares, *map(number, ranks), f"{change.cosine:.2f}", str(change.top), *subspaces)


def size(matrix: Row | Change) -> str:
    return f"{matrix.fan_out}x{matrix.fan_in}"


def short(dtype: str) -> str:
    """bf16 for bfloat16."""
    return re.sub(r"^(b?)float(?=\d)", lambda found: "bf" if found[1] else "fp", dtype)


def number(value: float) -> str:
    """Three digits, `-` for what was not measured."""
    return "-" if math.isnan(value) else f"{value:.0f}" if 1000 <= value < 1e5 else f"{value:.3g}"


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.3g} %"


def not_finite(count: int) -> str:
    return f"{count:,} {'entries are' if count > 1 else 'entry is'} nan or infinite"


def notable(rows: Sequence[Row]) -> list[Row]:
    """Not finite first, then by how far the largest singular value sticks out of what random entries would have."""
    return sorted(rows, key=lambda row: (-row.nonfinite, math.isnan(row.peak), -row.peak if row.peak == row.peak else 0.0))


def most_changed(changes: Sequence[Change]) -> list[Change]:
    order = {True: math.inf, False: 0.0}
    return sorted(changes, key=lambda c: (-c.nonfinite, order[math.isnan(c.relative)], -c.relative))


def show(found: Diagnosis, compared: Comparison | None, console: Console, limit: int) -> None:
    """The tables for people, `limit` rows of each, and the sentences."""
    rows = notable(found.rows)
    _print("matrices, those with the largest peak first", MATRIX_HEAD, rows, matrix_cells, console, limit)
    if found.unmeasured:
        _plain(console, f"listed, not measured: {_counted(tensor.why for tensor in found.unmeasured)}")
    if readings := _counted(row.how for row in found.rows if row.how not in ("matrix", "table")):
        _plain(console, f"matrices that were read otherwise than as they are stored: {readings}")
    for bad in (*rows, *found.unmeasured):
        if bad.nonfinite:
            _plain(console, f"{bad.name}: {not_finite(bad.nonfinite)}")
    if found.balls:
        title = "the balls that they fit: R, the largest norm, and the decay λ whose ball c/λ holds all"
        _print(title, BALL_HEAD, found.balls, ball_cells, console, 0)
    if found.bound is not None:
        _plain(console, found.bound.sentence())
    if compared is None:
        return
    changes = most_changed(compared.changes)
    _print("what changed, the most changed first", CHANGE_HEAD, changes, change_cells, console, limit)
    for error in compared.errors:
        _plain(console, f"error: {error}")
    for names, which in ((compared.only_first, "first"), (compared.only_second, "second")):
        if names:
            more = f" and {len(names) - limit} more" if limit and len(names) > limit else ""
            _plain(console, f"only in the {which}: {', '.join(names[:limit] if limit else names)}{more}")


def _counted(texts: Iterable[str]) -> str:
    return "; ".join(f"{count} x {text}" for text, count in Counter(texts).items())


def _plain(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)


def _print(
    title: str, head: Sequence[str], rows: Sequence[Any], cells: Callable[[Any], tuple[str, ...]], console: Console, limit: int
) -> None:
    shown = rows[:limit] if limit else rows
    left = f" ({len(shown)} of {len(rows)})" if len(shown) < len(rows) else ""
    table = Table(title=title + left, title_justify="left", highlight=False, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0)
    for row in shown:
        name, *others = cells(row)
        table.add_row(*(Text(cell) for cell in (re.sub(r"\.weight(?=\[|$)", "", name), *others)))
    console.print(table)
