"""A table of records, to read on a screen: one for each quantity, the worst matrices first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 10


def text(records: Sequence[Mapping[str, Any]], by: str | None = None, shown: int | None = SHOWN) -> str:
    """Of each quantity a table with a line for each matrix, the largest values first, after those with an alarm.

    The largest of a quantity's first column, or of column `by`, "quantity/column", in the table that has it; `shown` lines of
    each, all if None. Raises ValueError for a column that no record has.

    Example:
        >>> from schatten.monitor.table import text
        >>> print(text([{"step": 5, "name": "a", "update/rms": 0.1}, {"step": 5, "name": "b", "update/rms": 0.2}]))
        update, step 5  rms
        b               0.2
        a               0.1
    """
    if not records:
        return "Nothing has been measured yet."
    numbers = [key for r in records for key, value in r.items() if key != "step" and isinstance(value, (int, float))]
    columns = list(dict.fromkeys(numbers))
    if by is not None and by not in columns:
        raise ValueError(f"by must be one of {', '.join(columns)}, got {by!r}.")
    tables = []
    for quantity in dict.fromkeys(column.partition("/")[0] for column in columns):
        own = [column for column in columns if column.partition("/")[0] == quantity]
        tables.append(_table(quantity, own, records, by if by in own else own[0], shown))
    return "\n\n".join(tables)


def _table(quantity: str, columns: Sequence[str], records: Sequence[Mapping[str, Any]], by: str, shown: int | None) -> str:
    alarm = f"{quantity}/alarm"
    own = sorted((r for r in records if any(column in r for column in columns)), key=lambda r: (alarm not in r, -_size(r, by)))
    lines = [[f"{quantity}, step {own[0]['step']}", *(column.partition("/")[2] for column in columns)]]
    lines += [[r["name"], *(_number(r.get(column)) for column in columns)] for r in own[:shown]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    if shown is not None and len(own) > shown:
        rows.append(f"and {len(own) - shown} more: monitor.table(shown=None)")
    return "\n".join([*rows, *(f"{r['name']}: {r[alarm]}" for r in own if alarm in r)])


def _size(record: Mapping[str, Any], by: str) -> float:
    value = record.get(by)
    return -math.inf if value is None else math.inf if math.isnan(value) else value


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
