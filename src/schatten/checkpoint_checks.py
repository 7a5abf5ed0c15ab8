"""What can be wrong with a saved group beside its rule: names, layout, numbers, state. Every check returns its problems.

Nothing in a file may be trusted to have the type it should, so each value's is looked at before its value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from schatten.groups import check_numbers, name_of
from schatten.layout import Layout, resolve
from schatten.placements.local import plain
from schatten.placements.states import stray
from schatten.rule import Rule
from schatten.state import COUNTERS

Groups = Sequence[Mapping[str, Any]]

# What wrappers put into names: DDP and DataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# What to do about such a part in a file.
WHOLE = "load the file that this rank saved, or save by schatten.save or torch.distributed.checkpoint (docs/checkpoints.md)"


def is_number(value: Any) -> bool:
    """A real number or a tensor of one, or a sequence of them; no bool."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(is_number, value))
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
        return value.numel() == 1 and real and _has_values(value)
    return isinstance(value, Real) and not isinstance(value, bool)


def _has_values(t: Tensor) -> bool:
    return t.layout == torch.strided and not t.is_meta


# -- names -----------------------------------------------------------------------------------------------------------------


def unwrapped(name: str) -> str:
    """A parameter's name without the parts that wrappers such as DDP and torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def name_problems(saved_groups: Groups, live_groups: Groups) -> list[str]:
    """Names that are missing, unknown, in another group or order; none where a side has no names.

    Names are compared as a wrapper found them, and may all have one prefix more than the other side's.
    """
    given = [group["param_names"] for group in saved_groups if group.get("param_names") is not None]
    for group, names in ((g, g["param_names"]) for g in saved_groups if g.get("param_names") is not None):
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            return [f"param_names must be a list of names, the checkpoint has {names!r}."]
        if len(names) != len(group["params"]):
            return [f"The checkpoint has {len(names)} param_names for {len(group['params'])} parameters of a group."]
    own = [group["param_names"] for group in live_groups if "param_names" in group]
    if len(given) < len(saved_groups) or len(own) < len(live_groups):
        return []
    theirs, ours = alike([list(map(unwrapped, n)) for n in given], [list(map(unwrapped, n)) for n in own])
    places = {name: (g, i) for g, names in enumerate(theirs) for i, name in enumerate(names)}
    problems = []
    for g, names in enumerate(ours):
        for i, name in enumerate(names):
            if name not in places:
                problems.append(f"{name!r} is missing from the checkpoint.")
                continue
            h, j = places.pop(name)
            by, here = saved_groups[h]["algorithm"], live_groups[g]["algorithm"]
            if by != here:
                problems.append(f"{name!r} is trained by {by!r} in the checkpoint and by {here!r} here.")
            elif h != g:
                problems.append(f"{name!r} is in group {h} of the checkpoint and in group {g} here.")
            elif i != j and len(theirs[h]) == len(names):
                problems.append(f"The checkpoint has parameters in another order: number {i} is {name!r} here, {j} there.")
    return problems + [f"{name!r} is not trained by this optimizer." for name in places]


def alike(theirs: list[list[str]], ours: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Both without the prefix that all names of one side have more than those of the other."""
    a, b = {n for names in theirs for n in names}, {n for names in ours for n in names}
    for short, long in ((a, b), (b, a)):
        first = min(long, default="")
        for name in short:
            prefix = first.removesuffix(name)
            if first.endswith("." + name) and {prefix + n for n in short} == long:
                return _without(prefix, theirs), _without(prefix, ours)
    return theirs, ours


def _without(prefix: str, groups: list[list[str]]) -> list[list[str]]:
    return [[name.removeprefix(prefix) for name in names] for names in groups]


# -- layouts ---------------------------------------------------------------------------------------------------------------


def layout_text(layout: str | Layout) -> str:
    """A layout as a checkpoint has it: its kind's name if it has no options."""
    if isinstance(layout, Layout):
        return layout.kind if layout == Layout(layout.kind) else repr(layout)
    return layout


def layout_problem(saved: Any, live: str | Layout, shape: tuple[int, ...], name: str) -> str | None:
    """Whether a parameter is read as it was: `"auto"` is the kind that it stands for."""
    own = resolve(live, shape, name)
    full = own if isinstance(own, Layout) else Layout(own)
    texts = {layout_text(full)}
    if full.kind == "matrix" or (full.kind == "conv" and len(shape) > 3):
        texts.add(layout_text(replace(full, kind="auto")))
    if isinstance(saved, str) and saved in texts:
        return None
    return f"{name} of shape {shape} is read by the layout {layout_text(own)!r} here, by {saved!r} in the checkpoint."


# -- numbers ---------------------------------------------------------------------------------------------------------------


def number_problems(
    saved: Mapping[str, Any], live: Mapping[str, Any], merged: Mapping[str, Any], rule_of: Callable[..., Rule]
) -> list[str]:
    """Numbers a step would read that are missing, of another type, not finite or out of range."""
    spectral = live["algorithm"] == "spectral"
    read = rule_of(live).hyperparameters if spectral else ("betas", "eps")
    problems = []
    for key in ("lr", "weight_decay", "rounding", "maximize", "step", *read):
        if key not in saved:
            problems.append(f"{key!r} is missing.")
    for key, value in merged.items():
        if key in saved and not _well_formed(key, value, live.get(key)):
            problems.append(f"{key} is {value!r}.")
    if problems:
        return problems
    # A scheduler that cycles momentum writes it into AdamW groups too, where it stands for beta1.
    ranged = read if spectral else ("momentum",) if "momentum" in merged else ()
    try:
        check_numbers(merged, ranged)
        changed = spectral and repr(rule_of(merged)) != saved["rule"]
    except ValueError as error:
        return [str(error)]
    return ["Its numbers make another rule than its text."] if changed else []


def _well_formed(key: Any, value: Any, own: Any) -> bool:
    """Whether a group's value has the type the key needs; numbers must be finite."""
    match key:
        case "params" | "param_names" | "algorithm":
            return True
        case "maximize":
            return isinstance(value, bool)
        case "step":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        case "betas":
            return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_finite, value))
        case "lr" | "weight_decay" | "eps" | "momentum":
            return not isinstance(value, (list, tuple)) and is_finite(value)
    if is_number(own):
        return isinstance(value, (list, tuple)) == isinstance(own, (list, tuple)) and is_finite(value)
    return isinstance(key, str) and (not is_number(value) or is_finite(value))


def is_finite(value: Any) -> bool:
    """A number, or a sequence of them, without inf, nan or what no float holds."""
    if not is_number(value):
        return False
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


# -- state -----------------------------------------------------------------------------------------------------------------


def state_problems(
    saved_groups: Groups, live_groups: Groups, state: Mapping[Any, Any], live_state: Mapping[Tensor, Mapping[str, Tensor]]
) -> list[str]:
    """Parameters whose state is missing or does not fit, one line for each, and state of no parameter."""
    problems, seen = [], set()
    for saved, live in zip(saved_groups, live_groups, strict=True):
        for i, (index, p) in enumerate(zip(saved["params"], live["params"], strict=True)):
            who = f"{name_of(live, i)} of shape {tuple(p.shape)}"
            if index in seen:
                problems.append(f"{who}: its number {index!r} is another parameter's too.")
            elif index not in state:
                problems.append(f"{who}: has no state, needs {', '.join(live_state[p])}.")
            elif part := _part_problem(state[index], live_state[p]):
                return [f"{who}: {part}. All other tensors may be such parts too: {WHOLE}."]
            elif wrong := _entry_problems(state[index], live_state[p]):
                problems.append(f"{who}: {'; '.join(wrong)}.")
            seen.add(index)
    return problems + [f"State of no parameter, number {index!r}." for index in state if index not in seen]


def _part_problem(entry: Any, own: Mapping[str, Tensor]) -> str | None:
    """The first of a parameter's tensors that is another rank's part."""
    for key, t in own.items():
        if isinstance(entry, Mapping) and isinstance(value := entry.get(key), Tensor) and (why := stray(value, t)):
            return f"{key} {why}"
    return None


def _entry_problems(entry: Any, own: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(entry, Mapping):
        return [f"its state is no dict but {type(entry).__name__}"]
    problems = [f"{key} {tuple(value.shape)} is missing" for key, value in own.items() if key not in entry]
    for key, value in entry.items():
        if key not in own:
            problems.append(f"{key!r} is no state of it")
        elif problem := _tensor_problem(key, value, own[key]):
            problems.append(f"{key} {problem}")
    return problems


def _tensor_problem(key: str, value: Any, own: Tensor) -> str | None:
    if not isinstance(value, Tensor) or not _has_values(plain(value)):
        return f"is no dense tensor but {value if isinstance(value, Real) else type(value).__name__}"
    if value.shape != own.shape:
        return f"has shape {tuple(value.shape)}, not {tuple(own.shape)}"
    if value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
        return f"is {value.dtype}, not {own.dtype}"
    if not own.is_floating_point():
        return None
    # Each rank looks at its own part.
    value = plain(value).to(own.dtype)
    if not bool(value.isfinite().all()):
        return "has inf or nan"
    if (key in COUNTERS and not _counts(value)) or ("_sq" in key and bool((value < 0).any())):
        return "has a value that it cannot have"
    return None


def _counts(value: Tensor) -> bool:
    return bool(((value >= 0) & (value == value.floor())).all())
