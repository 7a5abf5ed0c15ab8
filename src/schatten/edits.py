"""Edits: users and schedulers write into param groups between steps, and a step must take what they wrote or say why not.

What a group looked like when it was last found good is kept and compared, which costs microseconds. New numbers are
checked as at construction; any other change, and a parameter or its state that is not what it was, has the whole group
checked and its state compared with what its rule would make. All of it before the first weight changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from schatten.groups import (
    check_layouts,
    check_names,
    check_numbers,
    check_parameters,
    name_of,
)
from schatten.rule import Rule
from schatten.state import LOST, fresh_state

RuleOf = Callable[[Mapping[str, Any]], Rule]

# Counted by the optimizer itself, or compared by their own means.
APART = ("params", "param_names", "step")


@dataclass
class Seen:
    """What a group was when it was last checked: numbers, other options, and the form of each parameter with its state."""

    numbers: dict[str, Any]
    options: dict[str, Any]
    forms: list[tuple[Any, ...]]

    @staticmethod
    def of(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Tensor]]) -> "Seen":
        own = {key: value for key, value in group.items() if key not in APART}
        numbers = {key: value for key, value in own.items() if _is_number(value)}
        return Seen(numbers, {k: v for k, v in own.items() if k not in numbers}, forms(group, state))


def forms(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Tensor]]) -> list[tuple[Any, ...]]:
    return [(id(p), p.shape, p.dtype, len(state[p]) if p in state else -1) for p in group["params"]]


def checked(
    number: int, group: dict[str, Any], seen: Seen, state: Mapping[Tensor, Mapping[str, Tensor]], rule_of: RuleOf
) -> Seen:
    """`seen` of a group that may be stepped, brought up to date.

    Raises ValueError, TypeError or RuntimeError, naming the option or the parameter, for a group that may not.
    """
    lost = [key for key in ("params", "step", *seen.numbers, *seen.options) if key not in group]
    if lost:
        raise ValueError(f"Param group {number} has lost its options {lost}: put them back. No weight was changed.")
    _check_tensors(number, group)
    numbers = [key for key, value in seen.numbers.items() if not _same(group[key], value)]
    options = [key for key, value in seen.options.items() if not _same(group[key], value)]
    if isinstance(group["step"], bool) or not isinstance(group["step"], int) or group["step"] < 0:
        raise ValueError(f"step counts a group's steps, got {group['step']!r}: it is the optimizer's own.")
    for key in numbers:
        if not _is_number(group[key]):
            raise TypeError(f"{key} of param group {number} must be a number as it was, got {group[key]!r}.")
    if options or forms(group, state) != seen.forms:
        _check_all(number, group, seen, options, state, rule_of)
    elif numbers:
        check_numbers(group, () if group["algorithm"] == "adamw" else rule_of(group).hyperparameters)
    else:
        return seen
    return Seen.of(group, state)


def _check_tensors(number: int, group: Mapping[str, Any]) -> None:
    params = group["params"]
    if not isinstance(params, list) or not all(isinstance(p, Tensor) for p in params):
        raise TypeError(f"params of group {number} must be a list of tensors: use add_param_group to add others.")
    check_names(group)


def _check_all(
    number: int,
    group: Mapping[str, Any],
    seen: Seen,
    changed: list[str],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    rule_of: RuleOf,
) -> None:
    if (was := seen.options.get("algorithm")) != group["algorithm"]:
        raise ValueError(
            f"algorithm of param group {number} was {was!r} and is {group['algorithm']!r}: the state of one does not serve the "
            f"other. Build the optimizer anew. No weight was changed."
        )
    check_parameters(group)
    rule = None
    if group["algorithm"] == "spectral":
        check_layouts(group)
        try:
            rule = rule_of(group)
        except Exception as error:
            raise ValueError(f"The options {changed} of param group {number} make no rule: {error}") from error
        check_numbers(group, rule.hyperparameters)
    else:
        check_numbers(group)
    for i, p in enumerate(group["params"]):
        if p not in state:
            continue  # put there by a wrapper or by hand, which `follow_replaced_` decides on
        wanted = fresh_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), group, rule)
        found = state[p]
        if LOST in found and LOST not in wanted:
            raise RuntimeError(
                f"{name_of(group, i)} keeps what rounding='kahan' took from it, and rounding is {group['rounding']!r} now: "
                f"build the optimizer anew. No weight was changed."
            )
        wrong = [
            key for key, t in wanted.items() if key not in found or found[key].shape != t.shape or found[key].dtype != t.dtype
        ]
        if wrong:
            why = f"options {changed} were changed" if changed else "parameter or its state was replaced"
            raise RuntimeError(
                f"{name_of(group, i)} of shape {tuple(p.shape)} has no fitting state for {wrong} since its group's {why}: "
                f"build the optimizer anew for the new params or options. No weight was changed."
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) > 0 and all(_is_number(v) for v in value)
    return isinstance(value, (Real, Tensor)) and not isinstance(value, bool)


def _same(a: Any, b: Any) -> bool:
    """Identical, or equal where that has one answer; a tensor that is filled anew is the same tensor."""
    if a is b:
        return True
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
