"""Routing: which rule trains each parameter of a model, decided from its modules, with a reason for each.

Hidden Linear and convolution weights go to the spectral rule. Embeddings and everything that shares their storage, the
output head, norms, biases and scalars go to AdamW, and so does a weight of a module type this file does not know:
orthogonalising a table or a gain is a silent error, training a matrix by AdamW a visible line in the plan.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from schatten.groups import ALGORITHMS
from schatten.layout import blocks, resolve

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Entry:
    """One parameter of a plan. `options` are the group options a rule gave it, such as `lr`."""

    name: str
    shape: tuple[int, ...]
    route: str
    layout: str
    reason: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every trainable parameter with its route and the reason; iterable, and printed as a table.

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

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def groups(self, model: nn.Module, options: Collection[str]) -> list[dict[str, Any]]:
        """Param groups for an optimizer, one for each combination of route, layout and options, with names; spectral groups
        come first, so that the lr a scheduler logs is theirs.

        Raises ValueError for an option of a rule that is not one of `options`.
        """
        params = dict(model.named_parameters())
        grouped: dict[Any, dict[str, Any]] = {}
        for entry in self.entries:
            for key, _ in entry.options:
                if key not in options:
                    raise ValueError(f"{entry.reason} has the option {key!r}, known are {', '.join(sorted(options))}.")
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
            rows.append((e.name, "x".join(map(str, e.shape)) or "scalar", e.route, _read_as(e), e.reason + options))
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
        return totals


def plan(model: nn.Module, rules: Sequence[tuple[Any, ...]] = (), *, others: str = "adamw") -> Plan:
    """Decide for every trainable parameter of `model` between the spectral rule and AdamW, by the module that owns it.

    `others` says where what is no hidden matrix goes: `"adamw"`, or `"spectral"`, to the same rule as the hidden matrices
    but read as one vector (layout `"flat"`), for rules that act on entries or on whole tensors.

    `rules` are overrides `(glob, route)` or `(glob, route, options)`: the first whose glob matches a parameter's name
    wins; `options` is a dict of group options, such as `{"lr": 1e-4}` or `{"layout": "experts"}`.

    Raises ValueError for a rule that matches no parameter or names no route, for a model with no spectral matrix, and
    for lazy modules that have no shapes yet.

    Example:
        >>> import torch, schatten
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> for entry in schatten.plan(model): print(entry.name, entry.route, entry.reason)
        0.weight adamw embedding
        1.weight spectral hidden Linear
        1.bias adamw bias
        2.weight adamw output head: Linear onto the vocabulary of 0.weight
        2.bias adamw bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan reads a torch.nn.Module, got {type(model).__name__}.")
    if others not in ALGORITHMS:
        raise ValueError(f"others must be one of {', '.join(map(repr, ALGORITHMS))}, got {others!r}.")
    overrides = [_rule(entry) for entry in rules]
    owners = _owners(model)
    tables, heads = _embeddings(owners), _heads(owners)
    matched = [False] * len(overrides)
    entries, frozen = [], 0
    for name, p in model.named_parameters():
        hits = [k for k, (glob, _, _) in enumerate(overrides) if fnmatchcase(name, glob)]
        for k in hits:
            matched[k] = True
        if not p.requires_grad:
            frozen += 1
            continue
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"{name!r} has no shape yet: run one batch through the lazy module, then build the optimizer.")
        if hits:
            glob, route, options = overrides[hits[0]]
            entries.append(_entry(name, p, route, f"rule {glob!r}", options))
        else:
            route, reason = _route(p, owners[id(p)], tables, heads)
            options = {"layout": "conv"} if "convolution" in reason else {}
            if route != "spectral" and others == "spectral":
                route, options = "spectral", {"layout": "flat"}
            entries.append(_entry(name, p, route, reason, options))
    for (glob, _, _), hit in zip(overrides, matched, strict=True):
        if not hit:
            names = ", ".join(name for name, _ in list(model.named_parameters())[:5])
            raise ValueError(f"Rule {glob!r} matches no parameter of the model, whose names are like: {names}.")
    if not any(e.route == "spectral" for e in entries):
        raise ValueError(
            "No parameter of this model is routed to a spectral rule, so it would train by AdamW alone. "
            'Add a rule such as ("blocks.*.weight", "spectral"), or use torch.optim.AdamW.\n'
            + str(Plan(tuple(entries), frozen))
        )
    return Plan(tuple(entries), frozen)


def _rule(entry: tuple[Any, ...]) -> tuple[str, str, dict[str, Any]]:
    if len(entry) not in (2, 3) or (len(entry) == 3 and not isinstance(entry[2], Mapping)):
        raise ValueError(f"A rule is (glob, route) or (glob, route, options dict), got {entry!r}.")
    glob, route, *rest = entry
    if route not in ALGORITHMS:
        raise ValueError(f"A rule's route must be one of {', '.join(map(repr, ALGORITHMS))}, got {route!r} for {glob!r}.")
    return glob, route, dict(rest[0]) if rest else {}


def _entry(name: str, p: Tensor, route: str, reason: str, options: Mapping[str, Any]) -> Entry:
    options = dict(options)
    layout = resolve(options.pop("layout", "auto"), tuple(p.shape), repr(name)) if route == "spectral" else "-"
    return Entry(name, tuple(p.shape), route, layout, reason, tuple(sorted(options.items())))


@dataclass(frozen=True)
class _Owner:
    """A place where a parameter is registered: shared parameters have several."""

    module: nn.Module
    attribute: str
    name: str
    parameter: Tensor


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    owners: dict[int, list[_Owner]] = {}
    for path, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owner = _Owner(module, attribute, f"{path}.{attribute}" if path else attribute, p)
            owners.setdefault(id(p), []).append(owner)
    return owners


def _storage(p: Tensor) -> int:
    """What views of one memory have in common, also on the meta device, where every address is 0."""
    return id(p) if isinstance(p, UninitializedParameter) else p.untyped_storage()._cdata


def _embeddings(owners: Mapping[int, list[_Owner]]) -> dict[int, _Owner]:
    """Storage -> the embedding that owns it."""
    places = [o for places in owners.values() for o in places if isinstance(o.module, EMBEDDINGS)]
    return {_storage(o.parameter): o for o in reversed(places)}


def _heads(owners: Mapping[int, list[_Owner]]) -> dict[int, _Owner]:
    """id of an output head's weight -> the embedding whose vocabulary it maps onto.

    A Linear that shares an embedding's storage is the head of a tied model. Otherwise it is the last Linear with
    out_features = vocabulary and in_features = width of an embedding; token tables come before position tables. A
    square table beside others is a position table, whose shape is also that of hidden matrices.
    """
    places = [o for places in owners.values() for o in places]
    linears = [o for o in places if isinstance(o.module, nn.Linear) and o.attribute == "weight"]
    embeddings = [o for o in places if isinstance(o.module, EMBEDDINGS) and not isinstance(o.parameter, UninitializedParameter)]
    tied = {_storage(o.parameter) for o in embeddings}
    if any(_storage(o.parameter) in tied for o in linears):
        return {}
    tables = [o for o in embeddings if o.parameter.shape[0] != o.parameter.shape[1]] or embeddings
    for embedding in tables:
        for linear in reversed(linears):
            if tuple(linear.parameter.shape) == tuple(embedding.parameter.shape):
                return {id(linear.parameter): embedding}
    return {}


def _route(p: Tensor, places: list[_Owner], tables: Mapping[int, _Owner], heads: Mapping[int, _Owner]) -> tuple[str, str]:
    owner = places[0]
    kind = type(owner.module).__name__
    if any(isinstance(place.module, EMBEDDINGS) for place in places):
        others = [place.name for place in places if not isinstance(place.module, EMBEDDINGS)]
        return "adamw", "embedding" + (f", tied with {', '.join(others)}" if others else "")
    if (table := tables.get(_storage(p))) is not None:
        return "adamw", f"shares storage with the embedding {table.name}"
    if id(p) in heads:
        return "adamw", f"output head: Linear onto the vocabulary of {heads[id(p)].name}"
    if isinstance(owner.module, NORMS):
        return "adamw", f"norm {owner.attribute} ({kind})"
    if p.ndim == 0:
        return "adamw", "scalar"
    if p.ndim == 1:
        return "adamw", "bias" if "bias" in owner.attribute else f"vector ({kind}.{owner.attribute})"
    if owner.attribute == "weight" and isinstance(owner.module, nn.Linear):
        return "spectral", "hidden Linear"
    if owner.attribute == "weight" and isinstance(owner.module, CONVOLUTIONS):
        return "spectral", "hidden convolution"
    return "adamw", f"{kind}.{owner.attribute} is of no known kind: add a rule if it is a matrix"


def _read_as(entry: Entry) -> str:
    if entry.route != "spectral":
        return "-"
    count, fan_out, fan_in = blocks(entry.layout, entry.shape)
    return f"{fan_out}x{fan_in}" if count == 1 else f"{count} of {fan_out}x{fan_in}"
