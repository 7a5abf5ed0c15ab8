"""What a plan says: an entry for each parameter, a table to read, and the param groups of an optimizer."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from schatten.groups import ALGORITHMS
from schatten.layout import Layout, pieces, resolve
from schatten.routing.places import named_parameters


@dataclass(frozen=True)
class Entry:
    """One parameter of a plan. `options` are the group options a rule gave it, such as `lr`."""

    name: str
    shape: tuple[int, ...]
    route: str
    layout: str | Layout
    reason: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every trainable parameter with its route and the reason; iterable, and printed as a table.

    `placement` is where an optimizer finds its parameters on several ranks and `kernels` what it computes with, which are no
    part of what plans are compared by.

    Example:
        >>> import torch, schatten
        >>> print(schatten.plan(torch.nn.Linear(4, 8)))
        parameter  shape  route     read as  reason
        ---------  -----  --------  -------  -------------
        weight     8x4    spectral  8x4      hidden Linear
        bias       8      adamw     -        bias
        spectral: 1 tensors, 32 parameters
        adamw: 1 tensors, 8 parameters
    """

    entries: tuple[Entry, ...]
    frozen: int = field(default=0)
    placement: str = field(default="", compare=False)
    kernels: str = field(default="", compare=False)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def groups(self, model: nn.Module, options: Collection[str]) -> list[dict[str, Any]]:
        """Param groups for an optimizer, one for each combination of route, layout and options, with names; spectral groups
        come first, so that the lr a scheduler logs is theirs.

        Raises ValueError for an option of a rule that is not one of `options`.
        """
        params = named_parameters(model)
        grouped: dict[Any, dict[str, Any]] = {}
        for entry in self.entries:
            for key, _ in entry.options:
                if key not in options:
                    raise ValueError(
                        f"{entry.name!r} has the option {key!r} of a rule, known are {', '.join(sorted(options))}."
                    )
            # Only a layout that the shape does not imply needs a group of its own.
            implied = entry.route == "adamw" or entry.layout == ("matrix" if len(entry.shape) == 2 else "conv")
            layout = {} if implied and len(entry.shape) != 3 else {"layout": entry.layout}
            key = (entry.route, tuple(layout.items()), entry.options)
            group = grouped.setdefault(key, {"params": [], "algorithm": entry.route, **layout, **dict(entry.options)})
            group["params"].append((entry.name, params[entry.name]))
        return sorted(grouped.values(), key=lambda group: group["algorithm"] != "spectral")

    @staticmethod
    def of_groups(groups: Iterable[Mapping[str, Any]]) -> "Plan":
        """The plan that hand-made param groups amount to."""
        entries = []
        for g, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                name = group["param_names"][i] if "param_names" in group else f"{g}.{i}"
                spectral = group["algorithm"] == "spectral"
                layout = resolve(group["layout"], tuple(p.shape), name) if spectral else "-"
                entries.append(Entry(name, tuple(p.shape), group["algorithm"], layout, "passed in this group"))
        return Plan(tuple(entries))

    def __str__(self) -> str:
        rows = [("parameter", "shape", "route", "read as", "reason")]
        for e in self.entries:
            options = "".join(f", {key}={value}" for key, value in e.options)
            rows.append((e.name, size(e.shape), e.route, read_as(e), e.reason + options))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self._totals()])

    def _totals(self) -> list[str]:
        totals = []
        for route in ALGORITHMS:
            sizes = [math.prod(e.shape) for e in self.entries if e.route == route]
            totals.append(f"{route}: {len(sizes)} tensors, {sum(sizes):,} parameters")
        if self.frozen:
            totals.append(f"frozen, not trained: {self.frozen} tensors")
        if self.placement:
            totals.append(f"placement: {self.placement}")
        if self.kernels:
            totals.append(f"kernels: {self.kernels}")
        return totals


def size(shape: tuple[int, ...]) -> str:
    """A shape in a table: 4x8."""
    return "x".join(map(str, shape)) or "scalar"


def read_as(entry: Entry) -> str:
    """The matrices of an entry in a table: `3 of 8x8 (split 3)`, with the layout's text where it cuts or transposes."""
    if entry.route != "spectral":
        return "-"
    own = [piece.blocks for piece in pieces(entry.layout, entry.shape)]
    text = " + ".join(f"{fan_out}x{fan_in}" if n == 1 else f"{n} of {fan_out}x{fan_in}" for n, fan_out, fan_in in own)
    return text if isinstance(entry.layout, str) else f"{text} ({str(entry.layout).removeprefix('matrix, ')})"
