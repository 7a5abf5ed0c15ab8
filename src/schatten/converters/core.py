"""What every converter does: other libraries' parameters matched with ours, checked, and written into our state.

A converter reads its library's dictionary into `Source`s; `converted` does the rest. What it returns is what
`opt.state_dict()` would hold had the optimizer run in the other's place: the next step of both is the same, up to how
exactly each computes U V^T.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from schatten import checkpoint
from schatten.checkpoint_checks import alike, is_finite, unwrapped
from schatten.converters.state import Method, Source, written
from schatten.groups import name_of
from schatten.maps import Map, Nuclear
from schatten.retractions import named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum

# Numbers that a group may have: a scheduler's, and AdamW's sign.
OPTIONAL = ("initial_lr", "maximize")

# What starts a spectral rule from AdamW's averages: the source as that rule's, or why it cannot be.
Adapted = Callable[[Source, Rule, Mapping[str, Any]], "Source | str"]


class Target(Protocol):
    """A schatten optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Tensor]]: ...

    def rule(self, group: Mapping[str, Any]) -> Rule: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Library:
    """A checkpoint: whose it is, for messages, the sizes of its groups and its parameters in order."""

    name: str
    sizes: tuple[int, ...]
    sources: tuple[Source, ...]

    def refuse(self, problems: Sequence[str], way_out: str = "") -> NoReturn:
        listed = checkpoint.LISTED
        more = [f"and {len(problems) - listed} more"] if len(problems) > listed else []
        lines = "\n  ".join([*problems[:listed], *more])
        raise ValueError(f"The checkpoint of {self.name} does not fit this optimizer:\n  {lines}\n{way_out}".rstrip())

    def __add__(self, other: "Library") -> "Library":
        return Library(f"{self.name} and {other.name}", self.sizes + other.sizes, self.sources + other.sources)


@dataclass(frozen=True)
class Entry:
    """One parameter as a dictionary has it."""

    name: str | None
    group: Mapping[str, Any]
    state: Mapping[str, Any]


def entries(library: str, state_dict: Mapping[str, Any], names: Sequence[str] | None) -> tuple[list[Entry], tuple[int, ...]]:
    """The parameters of a dictionary with their names, and the sizes of its groups.

    `names` go before the dictionary's own. Raises ValueError where they are not one for each parameter.
    """
    groups, state = checkpoint.taken_apart(state_dict)
    indices = [(group, index) for group in groups for index in group["params"]]
    if names is None and groups and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is not None:
        names = list(names)
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names) or len(names) != len(indices):
            raise ValueError(
                f"names must be one for each of the {len(indices)} parameters of {library}'s checkpoint, in its order, and "
                f"no two the same; got {len(names)}: {', '.join(map(repr, names[: checkpoint.LISTED]))}."
            )
    found = []
    for i, (group, index) in enumerate(indices):
        own = state.get(index, {})
        if not isinstance(own, Mapping):
            raise ValueError(f"The state of a parameter is a dict, number {index!r} of {library}'s checkpoint is not.")
        found.append(Entry(names[i] if names is not None else None, group, own))
    return found, tuple(len(group["params"]) for group in groups)


def library_of(
    name: str,
    state_dict: Mapping[str, Any],
    names: Sequence[str] | None,
    source: Callable[[Entry], Source],
) -> Library:
    """The checkpoint of a library, read parameter by parameter by `source`."""
    found, sizes = entries(name, state_dict, names)
    return Library(name, sizes, tuple(map(source, found)))


def choice(library: str, group: Mapping[str, Any], key: str, table: Mapping[Any, Any]) -> Any:
    """What `group[key]` stands for in a closed table; ValueError for anything else."""
    value = values_of(library, group, {key: key})[key]
    for known, meaning in table.items():
        if type(known) is type(value) and known == value:
            return meaning
    known = " or ".join(map(repr, table))
    raise ValueError(f"Of {library} only {key} {known} can be taken over, the checkpoint has {value!r}.")


def numbers_of(library: str, group: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A group's numbers under our names, with those that it may have beside them."""
    return {**values_of(library, group, names), **renamed(group, {key: key for key in OPTIONAL})}


def state_of(library: str, state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A parameter's state under our names, all of it or, where it was never stepped, nothing."""
    return values_of(library, state, names, "the state of a parameter") if state else {}


def values_of(library: str, values: Mapping[str, Any], names: Mapping[str, str], what: str = "a group") -> dict[str, Any]:
    """What `values` has for each of `names`, under our names; ValueError where it has nothing."""
    if missing := [key for key in names if key not in values]:
        raise ValueError(
            f"This is no checkpoint of {library}: {what} has no {', '.join(missing)}, only "
            f"{', '.join(sorted(map(str, values)))}."
        )
    return renamed(values, names)


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Those of `values` whose names `names` has, under our names."""
    return {ours: values[theirs] for theirs, ours in names.items() if theirs in values}


def converted(library: Library, opt: Target, adapted: Adapted | None = None) -> dict[str, Any]:
    """A state_dict that `opt` loads, made of every parameter's `Source`. ValueError lists what does not fit."""
    made, problems = opt.state_dict(), []
    for live, saved, matched in zip(opt.param_groups, made["param_groups"], _matched(library, opt), strict=True):
        rule = opt.rule(live) if live["algorithm"] == "spectral" else None
        sources, misfits = _routed(matched, live, rule, adapted)
        if misfits:
            problems += misfits
            continue
        for i, (p, index, source) in enumerate(zip(live["params"], saved["params"], sources, strict=True)):
            who = f"{name_of(live, i)} of shape {tuple(p.shape)}"
            wrong, made["state"][index] = written(source, p, live, rule, opt.state[p])
            problems += [f"{who}: {problem}." for problem in wrong]
        numbers, different = _numbers(sources)
        problems += different
        saved.update({"maximize": False, **numbers, "step": 0})
    if problems:
        library.refuse(problems)
    checkpoint.checked(made, opt.param_groups, opt.state, opt.rule)
    return made


def _matched(library: Library, opt: Target) -> list[list[Source]]:
    """For each of our groups its parameters' sources: by name, or in order where there are no names to go by."""
    groups, sources = opt.param_groups, library.sources
    sizes = tuple(len(group["params"]) for group in groups)
    ours = [list(map(unwrapped, group["param_names"])) for group in groups if "param_names" in group]
    theirs = [unwrapped(source.name) for source in sources if source.name is not None]
    if len(ours) == len(groups) and len(theirs) == len(sources):
        (theirs,), ours = alike([theirs], ours)
        known = dict(zip(theirs, sources, strict=True))
        missing = [f"{name!r} is not in it." for names in ours for name in names if name not in known]
        trained = {name for names in ours for name in names}
        lost = [f"{name!r} is not trained here." for name, source in known.items() if source.state and name not in trained]
        if missing or lost:
            library.refuse(missing + lost, "Build the optimizer from the same model, or correct `names`.")
        return [[known[name] for name in names] for names in ours]
    if sizes != library.sizes or len(ours) == len(groups) > 1:
        there, here = (", ".join(map(str, of)) for of in (library.sizes, sizes))
        library.refuse(
            [f"it has groups of {there} parameters, this optimizer of {here}."],
            "They can be matched by name: build the optimizer from the model and pass names=[...], the names of the "
            "checkpoint's parameters in its order, such as [name for name, _ in model.named_parameters()].",
        )
    rest = iter(sources)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _routed(
    sources: Sequence[Source], group: Mapping[str, Any], rule: Rule | None, adapted: Adapted | None
) -> tuple[list[Source], list[str]]:
    """The sources of a group as its algorithm's, and why some are not."""
    found, problems = [], []
    for i, source in enumerate(sources):
        name = name_of(group, i)
        if rule is None and source.method is not None:
            problems.append(f'{name} was trained by {source.method.preset}, here by AdamW: route it to "spectral".')
        elif rule is not None and source.method is None:
            own = adapted(source, rule, group) if adapted else 'was trained by AdamW, here by a rule: route it to "adamw".'
            problems += [f"{name} {own}"] if isinstance(own, str) else []
            found += [] if isinstance(own, str) else [own]
        elif rule is not None and source.method is not None and (problem := _rule_problem(source.method, rule)):
            problems += [problem] if problem not in problems else []
        else:
            found.append(source)
    return found, problems


def _rule_problem(method: Method, rule: Rule) -> str | None:
    muon = isinstance(rule.map, Nuclear) if method.preset == "Muon" else not isinstance(rule.map, Map)
    keeps = set(rule.init(torch.empty(1, 1, 1))) == set(method.keeps)
    signal = isinstance(rule.signal, Momentum) and rule.signal.nesterov == method.nesterov
    scales = (Scale(method.scale),) if method.factor is None else (Scale(method.scale), Scale("none"))
    if muon and keeps and signal and rule.scale in scales and rule.retraction == named(method.decay):
        return None
    return (
        f"it is of another rule than this optimizer's {rule!r}: build schatten.{method.preset} with scale={method.scale!r}, "
        f"nesterov={method.nesterov} and decay={method.decay!r}."
    )


def _numbers(sources: Sequence[Source]) -> tuple[dict[str, Any], list[str]]:
    """The numbers that all parameters of a group share, and why some are not shared."""
    if not sources:
        return {}, []
    first, problems = sources[0].numbers, []
    for key in dict.fromkeys(key for source in sources for key in source.numbers):
        others = [source.numbers.get(key) for source in sources if not _same(source.numbers.get(key), first.get(key))]
        if others:
            problems.append(
                f"parameters of one group here have {key} {first.get(key)} and {others[0]} there: give them groups of their "
                f'own, such as by rules=[("*.bias", "adamw", {{"{key}": {others[0]}}})].'
            )
    return dict(first), problems


def _same(a: Any, b: Any) -> bool:
    if not is_finite(a) or not is_finite(b):
        return repr(a) == repr(b)
    if isinstance(a, Sequence) or isinstance(b, Sequence):
        return isinstance(a, Sequence) and isinstance(b, Sequence) and len(a) == len(b) and all(map(_same, a, b))
    return float(a) == float(b)
