"""Values: what quantities found, from tensors on devices to records of plain numbers."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Blocks of one parameter that have records of their own; of more a record has the smallest, mean and largest value.
LISTED = 16


class Found(NamedTuple):
    """What one quantity returned of a parameter's blocks, or of a whole model (blocks None)."""

    name: str
    quantity: str
    columns: Mapping[str, Tensor]
    blocks: int | None


class Row(NamedTuple):
    """What one quantity found of one matrix `name` of a parameter: numbers, or lists of them, by the name of the column."""

    parameter: str
    name: str
    quantity: str
    columns: dict[str, Any]


def rows(found: Sequence[Found]) -> list[Row]:
    """One row for each matrix: a parameter with several blocks has rows with `[0]`, `[1]`, ... after its name."""
    made = []
    plain = iter(_lists([t for one in found for t in one.columns.values()]))
    for one in found:
        values = {column: next(plain) for column in one.columns}
        if one.blocks is None:
            made.append(Row(one.name, one.name, one.quantity, values))
            continue
        for i in range(one.blocks):
            own = {column: value[i] if _each(one.columns[column], one.blocks) else value for column, value in values.items()}
            made.append(Row(one.name, one.name + (f"[{i}]" if one.blocks > 1 else ""), one.quantity, own))
    return made


def records(step: int, made: Sequence[Row], alarms: Mapping[tuple[str, str], str]) -> list[dict[str, Any]]:
    """A record for each matrix, with "quantity/column" for every value and "quantity/alarm" where there is one."""
    by_parameter: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in made:
        by_parameter[row.parameter][row.name].append(row)
    found = []
    for name, matrices in by_parameter.items():
        own = []
        for matrix, of_matrix in matrices.items():
            record: dict[str, Any] = {"step": step, "name": matrix}
            for row in of_matrix:
                record |= {f"{row.quantity}/{column}": value for column, value in row.columns.items()}
                if message := alarms.get((row.name, row.quantity)):
                    record[f"{row.quantity}/alarm"] = message
            own.append(record)
        found += own if len(own) <= LISTED else [_summary(step, name, own)]
    return found


def _summary(step: int, name: str, own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of many blocks: smallest, mean and largest numbers, mean lists, the first alarm."""
    record: dict[str, Any] = {"step": step, "name": f"{name}[{len(own)} blocks]"}
    for key in dict.fromkeys(key for one in own for key in one if key not in ("step", "name")):
        values = [one[key] for one in own if key in one]
        if isinstance(values[0], str):
            record[key] = values[0]
        elif isinstance(values[0], list):
            record[key] = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        else:
            undefined = any(math.isnan(value) for value in values)
            record[key + ".min"], record[key + ".max"] = (math.nan,) * 2 if undefined else (min(values), max(values))
            record[key + ".mean"] = sum(values) / len(values)
    return record


def _each(t: Tensor, blocks: int) -> bool:
    """Whether a column has a value for each block."""
    return t.ndim > 0 and t.shape[0] == blocks


def _lists(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of tensors as numbers or nested lists, with one transfer for each device they are on."""
    found: list[Any] = [None] * len(tensors)
    on: dict[torch.device, list[int]] = defaultdict(list)
    for i, t in enumerate(tensors):
        on[t.device].append(i)
    for device, numbers in on.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([tensors[i].detach().reshape(-1).to(wide) for i in numbers]).cpu()
        for i, own in zip(numbers, flat.split([tensors[i].numel() for i in numbers]), strict=True):
            found[i] = own.reshape(tensors[i].shape).tolist()
    return found


def scalars(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of records in one dict, under "quantity/column/name".

    Example:
        >>> from schatten.monitor.values import scalars
        >>> scalars([{"step": 1, "name": "W", "update/rms": 0.5, "spectrum/weight_histogram": [1.0, 0.0]}])
        {'update/rms/W': 0.5}
    """
    return {f"{key}/{r['name']}": value for r in found for key, value in r.items() if isinstance(value, float)}
