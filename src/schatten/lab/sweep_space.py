"""What a sweep varies: `--space` entries, the settings an optimizer has, and an optimizer of one point.

lr=1e-4:1e-1            any number between, drawn on a logarithmic scale
momentum=lin:0.8:0.99   the same on a linear scale
weight_decay=0,0.1      one of a list
"""

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from schatten.groups import ADAMW_DEFAULTS
from schatten.lab import optimizers
from schatten.lab.errors import InputError
from schatten.lab.models import MLP
from schatten.lab.tuning import Params, Span

Entry = Span | tuple[float, ...]

EXAMPLE = "lr=1e-4:1e-1, momentum=lin:0.8:0.99 or weight_decay=0,0.1"

# Of the AdamW beside a spectral rule; eps and decay included.
AUX = ("aux_lr", "aux_weight_decay", "aux_eps", "aux_beta1", "aux_beta2")

# Explicit decay above lr = 1 / weight_decay: a sweep looks for such edges on purpose.
EDGE = r"lr \* weight_decay is"


def parse(entries: Sequence[str]) -> dict[str, Entry]:
    """`--space` entries by name. Raises InputError for one that is malformed or given twice."""
    space: dict[str, Entry] = {}
    for entry in entries:
        name, separator, values = (part.strip() for part in entry.partition("="))
        if not (name and separator and values):
            raise InputError(f"--space takes NAME=VALUES such as {EXAMPLE}, got {entry!r}.")
        if name in space:
            raise InputError(f"--space has {name} twice: give each name once.")
        space[name] = _span(entry, values) if ":" in values else _choices(entry, values)
    if not space:
        raise InputError(f"--space is missing: give at least one of {EXAMPLE}.")
    return space


def _span(entry: str, values: str) -> Span:
    linear = values.startswith("lin:")
    low, separator, high = values.removeprefix("lin:").partition(":")
    span = Span(_number(entry, low), _number(entry, high if separator else ""), log=not linear)
    if not span.low < span.high:
        raise InputError(f"--space needs LOW below HIGH, got {entry!r}.")
    if span.log and span.low <= 0:
        raise InputError(
            f"--space {entry!r} is a logarithmic span, which needs LOW above 0: for a linear one write lin:LOW:HIGH."
        )
    return span


def _choices(entry: str, values: str) -> tuple[float, ...]:
    choices = tuple(_number(entry, value) for value in values.split(","))
    if len(set(choices)) < len(choices):
        raise InputError(f"--space needs different values, got {entry!r}.")
    return choices


def _number(entry: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--space takes finite numbers such as {EXAMPLE}, got {text!r} in {entry!r}.")
    return value


def plain(space: Mapping[str, Entry]) -> dict[str, Any]:
    """The space as JSON values."""
    return {
        name: {"low": entry.low, "high": entry.high, "log": entry.log} if isinstance(entry, Span) else list(entry)
        for name, entry in space.items()
    }


def grid(space: Mapping[str, Entry], seed: int) -> list[Params]:
    """Every point of lists, in an order drawn by `seed`: an interrupted grid has then looked everywhere.

    Raises InputError for a span.
    """
    if spans := [name for name, entry in space.items() if isinstance(entry, Span)]:
        raise InputError(f"--sampler grid tries every point of lists, but {', '.join(spans)} is a span: list its values.")
    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]  # type: ignore[arg-type]
    random.Random(seed).shuffle(points)
    return points


def known(optimizer: str) -> tuple[str, ...]:
    """The settings of `optimizer` that a space may name. Raises InputError for an unknown optimizer."""
    built = build(optimizer, MLP((4, 4, 2), bias=True), {})
    names = ["lr"]
    contestant = optimizers.contestants().get(optimizer)
    if contestant is None or contestant.preset not in optimizers.OWN_DECAY:
        names.append("weight_decay")
    groups = _own(built)
    for key, value in groups[0].items():
        if key == "betas":
            names += ["beta1", "beta2"]
        elif isinstance(value, float) and key not in names and key != "weight_decay":
            names.append(key)
    beside = any(group["params"] for group in built.param_groups if not _spectral(group))
    return (*names, *(AUX if beside else ()))


def check(optimizer: str, space: Mapping[str, Entry]) -> None:
    """Raise InputError for a setting that the optimizer lacks, or one of its values out of range."""
    if unknown := [name for name in space if name not in known(optimizer)]:
        raise InputError(f"--space has {', '.join(unknown)}, which {optimizer} lacks: it has {', '.join(known(optimizer))}.")
    for name, entry in space.items():
        for value in (entry.low, entry.high) if isinstance(entry, Span) else entry:
            try:
                _step(optimizer, {name: value})
            except ValueError as error:
                raise InputError(f"--space {name} cannot be {value:g} for {optimizer}: {error}") from None


def build(optimizer: str, model: nn.Module, params: Params) -> torch.optim.Optimizer:
    """The optimizer of all of `model` at one point; what `params` leaves out is its documented default."""
    betas = ADAMW_DEFAULTS["betas"]
    aux_betas = (params.get("aux_beta1", betas[0]), params.get("aux_beta2", betas[1]))
    aux = {key.removeprefix("aux_"): params[key] for key in ("aux_lr", "aux_weight_decay", "aux_eps") if key in params}
    lr = params["lr"] if "lr" in params else optimizers.default_lr(optimizer)
    decay = params.get("weight_decay")
    built = optimizers.build(optimizer, model, lr=lr, weight_decay=decay, betas=aux_betas, aux=aux or None)
    for group in _own(built):
        if "betas" in group:
            group["betas"] = (params.get("beta1", group["betas"][0]), params.get("beta2", group["betas"][1]))
        # A rule's other numbers live in its groups, where schedules change them too, and are checked at the step.
        group.update({key: value for key, value in params.items() if key in group and key not in ("lr", "weight_decay")})
    return built


def _own(built: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of the rule itself, not those of the AdamW beside it."""
    return [group for group in built.param_groups if _spectral(group)]


def _spectral(group: dict[str, Any]) -> bool:
    # torch's AdamW, the baseline, is one rule for all.
    return group.get("algorithm", "spectral") == "spectral"


def _step(optimizer: str, params: Params) -> None:
    """One step of a tiny model: what refuses a number does so here."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=EDGE)
        model = MLP((4, 4, 2), bias=True)
        built = build(optimizer, model, params)

        def closure() -> torch.Tensor:
            built.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        closure()
        built.step(closure if optimizers.evaluates(optimizer) else None)  # type: ignore[call-overload, arg-type]
