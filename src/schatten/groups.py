"""Param groups: which keys each algorithm has, and the checks a group passes before it joins an optimizer."""

import math
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from schatten.layout import resolve
from schatten.rounding import ROUNDINGS
from schatten.state import STATE_DTYPES

ALGORITHMS = ("spectral", "adamw")

UNORDERED = "Parameters must come in a fixed order, got a set: pass a list."

SHARED_KEYS = ("lr", "weight_decay", "rounding", "maximize")


SCHEDULERS_OWN = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")

ADAMW_DEFAULTS = {"betas": (0.9, 0.95), "eps": 1e-8}

# The form of a saved group, written into it.
SCHEMA = 1


def completed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group with the defaults of its algorithm and what a saved group has; only an AdamW group has AdamW's own.

    Raises ValueError for names that are not one for each parameter, an unknown algorithm and a misspelt option.
    """
    check_names(group)
    algorithm = group["algorithm"]
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}.")
    check_spelling(group, {*defaults, *ADAMW_DEFAULTS, "params", "param_names", "algorithm", "rule", *SCHEDULERS_OWN})
    spectral = algorithm == "spectral"
    inherited = {k: v for k, v in defaults.items() if k != "adamw" and (spectral or k in SHARED_KEYS)}
    # torch.distributed.checkpoint's flat form reads no keys that the live group lacks.
    saved = {"step": 0, "schema": SCHEMA, **({"rule": None} if spectral else {})}
    return {**saved, **inherited, **({} if spectral else defaults["adamw"]), **group}


def name_of(group: Mapping[str, Any], index: int) -> str:
    """The parameter's name, or its place in the group where it has none, with its quotes."""
    names = group.get("param_names")
    return repr(names[index]) if names else f"params[{index}]"


def check_numbers(group: Mapping[str, Any], hyperparameters: Sequence[str] = ()) -> None:
    """Raise ValueError for an lr, decay, momentum, beta or eps outside its range; `hyperparameters` must lie in [0, 1)."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor with one element, got shape {tuple(lr.shape)}.")
    for key in ("lr", "weight_decay", "eps"):
        if key in group and not 0.0 <= _number(key, group[key]) < float("inf"):
            raise ValueError(f"{key} must be finite and >= 0, got {group[key]}.")
    for key in hyperparameters:
        if key not in group:
            raise ValueError(f"This rule needs a value for {key!r}: pass {key}=..., or write it into the group.")
        if key != "betas" and not 0.0 <= _number(key, group[key]) < 1.0:
            raise ValueError(f"{key} must lie in [0, 1), got {group[key]}.")
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0.0 <= _number("betas", b) < 1.0 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}.")
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize must be True or False, got {group['maximize']!r}.")
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {group['rounding']!r}.")


def _number(key: str, value: Any) -> float:
    """A number that fp64 holds; inf for what is beyond it."""
    if isinstance(value, Tensor) and not value.is_complex() and value.numel() == 1:
        # A value on a device is not looked at: a step with edited numbers would wait for it.
        return float(value) if value.device.type == "cpu" else 0.0
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{key} must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_names(group: Mapping[str, Any]) -> None:
    """Raise ValueError for names that are not one for each parameter."""
    if len(group.get("param_names", group["params"])) != len(group["params"]):
        raise ValueError(
            f"param_names must name every parameter of the group, got {len(group['param_names'])} names for "
            f"{len(group['params'])} parameters: drop the key, or pass (name, tensor) pairs."
        )


def check_spelling(group: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for an option that is nearly one of `known`; others are the caller's own, as torch allows."""
    for key in group:
        if key not in known and (close := get_close_matches(str(key), known, n=1, cutoff=0.85)):
            raise ValueError(f"A group has the option {key!r}, which nothing reads: did you mean {close[0]!r}?")


def check_stability(group: Mapping[str, Any]) -> None:
    """Warn where explicit decay overshoots: lr lambda > 1 multiplies a weight by a negative number at every step."""
    if _number("lr", group["lr"]) * _number("weight_decay", group["weight_decay"]) > 1:
        warnings.warn(
            f"lr * weight_decay is {float(group['lr'] * group['weight_decay']):g}: explicit decay multiplies weights by 1 "
            f"minus it, so above 1 they change sign at every step and from 2 on diverge; bounds on weights and gradients, and "
            f"with them every critical batch size, hold for lr <= 1 / weight_decay only (arXiv 2507.01598). Lower one of them, "
            f'or take decay="implicit", which is stable for any.',
            stacklevel=4,
        )


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise for parameters that no rule can train: duplicates, complex or integer, sparse; each is named."""
    seen: dict[Tensor, str] = {}
    for i, p in enumerate(group["params"]):
        name = name_of(group, i)
        if p in seen:
            raise ValueError(
                f"A parameter may appear once, but {name} and {seen[p]} are the same tensor of shape {tuple(p.shape)}."
            )
        seen[p] = name
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is no leaf: it is computed from others. Pass the parameters themselves."
            )
        if p.is_complex():
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is complex ({p.dtype}), which no rule here defines: "
                f"store its real and imaginary parts (torch.view_as_real) as parameters."
            )
        if not p.is_floating_point():
            raise ValueError(f"Parameters must be floating point, but {name} of shape {tuple(p.shape)} is {p.dtype}.")
        if (
            p.layout == torch.strided
            and p.numel()
            and any(n > 1 and not step for n, step in zip(p.shape, p.stride(), strict=True))
        ):
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} is expanded: several of its entries are one number in memory, which no step "
                f"can move apart. Pass a contiguous copy."
            )
        if p.layout != torch.strided:
            raise ValueError(f"Parameters must be dense, but {name} of shape {tuple(p.shape)} is {p.layout}: call .to_dense().")


def check_layouts(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that the group's layout cannot read as matrices."""
    for i, p in enumerate(group["params"]):
        resolve(group["layout"], tuple(p.shape), name_of(group, i))
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {', '.join(map(repr, STATE_DTYPES))}, got {group['state_dtype']!r}.")


def follow_replaced_(
    state: MutableMapping[Tensor, Any], groups: Sequence[Mapping[str, Any]], fresh: Callable[[Tensor, Mapping[str, Any]], Any]
) -> None:
    """Give fresh state to tensors that a wrapper has put into the groups, as accelerate does when it shards (FSDP2).

    Raises RuntimeError that names such a tensor once its group has been stepped.
    """
    owned = {p for group in groups for p in group["params"]}
    if owned <= state.keys():
        return
    new = [(p, group, i) for group in groups for i, p in enumerate(group["params"]) if p not in state]
    for p, group, i in new:
        if group["step"]:
            raise RuntimeError(
                f"{name_of(group, i)} of shape {tuple(p.shape)} was put into its group after {group['step']} steps and has no "
                f"state: shard or wrap a model before its first step, or build the optimizer anew and load its state_dict. "
                f"No weight was changed."
            )
    for p, group, _ in new:
        state[p] = fresh(p, group)
    for p in [p for p in state if p not in owned]:
        del state[p]


def unpack(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """The tensors of a group given as one tensor, tensors or (name, tensor) pairs, and their names if they have any."""
    if isinstance(params, Tensor):
        return [params], None
    if isinstance(params, (set, frozenset)):
        raise TypeError(UNORDERED)
    items = list(params)
    named = [item for item in items if isinstance(item, tuple)]
    if named and len(named) != len(items):
        raise ValueError(f"Give names to all parameters of a group or to none: {len(named)} of {len(items)} have one.")
    tensors = [item[1] for item in named] if named else items
    for item in tensors:
        if not isinstance(item, Tensor):
            raise TypeError(f"Parameters must be tensors or (name, tensor) pairs, got {type(item).__name__}.")
    return tensors, [item[0] for item in named] if named else None
