"""What the tables of docs/speed.md are made of: numbers with fixed rounding, times with quartiles, and what a run ran on.

A row ends in device, torch and commit. Times are medians with quartiles over a run's rounds, or with the smallest and largest
of fewer than four.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]
Row = list[str]

ABSENT = "-"


@dataclass(frozen=True)
class Table:
    """A section of the page.

    `files` says of each JSON file what run it records, `measured` in a sentence or two what was timed and how, `command`
    what prints it. `rows` makes the lines of one file.
    """

    title: str
    files: Mapping[str, str]
    measured: str
    command: str
    columns: tuple[str, ...]
    rows: Callable[[Run], list[Row]]


def number(value: float | None, unit: str = "") -> str:
    """Three digits, or all that stand before the point."""
    if value is None:
        return ABSENT
    digits = next((d for d, least in enumerate((100, 10, 1)) if abs(value) >= least), 3)
    return f"{value:.{digits}f}{unit}"


def spread(times: Sequence[float] | None) -> str:
    """The median, and in brackets the quartiles."""
    return number(statistics.median(times)) + quartiles(times) if times else ABSENT


def quartiles(times: Sequence[float]) -> str:
    """The quartiles in brackets; of fewer than four times their range, as quartiles would lie outside of it."""
    if len(times) < 2:
        return ""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 3 else (min(times), 0.0, max(times))
    return f" ({number(low)} - {number(high)})"


def ratio(over: Sequence[float] | None, under: Sequence[float] | None) -> str:
    """The ratio of two medians."""
    if not over or not under:
        return ABSENT
    return f"{statistics.median(over) / statistics.median(under):.2f}"


def mebibytes(count: float | None) -> str:
    return ABSENT if count is None else number(count / 2**20)


def stamp(run: Run) -> Row:
    """What a run ran on: device, torch, commit."""
    return [device(run), run.get("torch", ABSENT), run.get("commit") or ABSENT]


def device(run: Run) -> str:
    """The name of a GPU; of a CPU its cores and architecture, and the threads where they are fewer."""
    name = run.get("device", "cpu")
    if name != "cpu":
        return name
    cores, threads = run.get("cores"), run.get("threads")
    parts = [name, f"{cores} cores" if cores else "", run.get("machine", "")]
    if threads and threads != cores:
        parts.append(f"{threads} thread" + "s" * (threads > 1))
    return ", ".join(part for part in parts if part)


STAMP = ("device", "torch", "commit")


def quartered(found: Sequence[float] | None, factor: float = 1.0, unit: str = "") -> str:
    """[lower quartile, median, upper quartile] as a run has recorded them."""
    if not found:
        return ABSENT
    low, middle, high = (number(None if value is None else factor * value) for value in found)
    return f"{middle} ({low} - {high}){unit}"
