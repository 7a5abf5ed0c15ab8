"""One parameter of another library, and its state written as ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor

from schatten.blockwise import encode
from schatten.checkpoint_checks import is_finite, layout_text
from schatten.layout import Layout, Piece, pieces
from schatten.placements.local import plain
from schatten.placements.states import placed_as, stray, whole_of
from schatten.rule import Rule
from schatten.signals import Momentum
from schatten.state import COUNTERS, SCALES, suffixes, wide

# NorMuon's second moment of rows.
ROWS = "exp_avg_row_sq"


@dataclass(frozen=True)
class Method:
    """How another library steps a matrix: the momentum it keeps and the rule it follows, with U V^T by any solver.

    `layout` is how it reads a parameter of a shape; `factor` what it multiplies by, where that is not always `scale`'s.
    `preset` is ours with that rule, which keeps `keeps`.
    """

    form: str
    nesterov: bool
    scale: str
    layout: Callable[[tuple[int, ...]], str | Layout]
    factor: Callable[[tuple[int, ...]], float] | None = None
    decay: str = "explicit"
    preset: str = "Muon"
    keeps: tuple[str, ...] = ("momentum_buffer",)


@dataclass(frozen=True)
class Source:
    """One parameter of another library's checkpoint, in our words.

    Trained by `method`, or by AdamW where that is None. `state` has our keys, `momentum_buffer` in the method's form, and is
    empty where the parameter was never stepped; `numbers` are its group's.
    """

    name: str | None
    state: Mapping[str, Any]
    numbers: Mapping[str, Any]
    method: Method | None = None


def written(
    source: Source, p: Tensor, group: Mapping[str, Any], rule: Rule | None, own: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """What does not fit of one parameter, and its state: the source's values, zeros where it has none.

    State that ranks have divided, there or here, is written whole and then placed as `own`.
    """
    problems, state = _written_whole(source, p, group, rule, own)
    return problems, {key: placed_as(value, own[key], value.dtype) for key, value in state.items()}


def _written_whole(
    source: Source, p: Tensor, group: Mapping[str, Any], rule: Rule | None, own: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    state = {key: torch.zeros(t.shape, dtype=t.dtype, device=plain(t).device) for key, t in own.items()}
    parts = pieces(group["layout"] if rule is not None else "flat", tuple(p.shape))
    times, problems = 1.0, []
    if rule is not None and (method := source.method) is not None:
        problems = _method_problems(method, parts, rule)
        beta: Any = source.numbers["momentum"]
        if not is_finite(beta) or isinstance(beta, Sequence) or not 0 <= float(beta) < 1:
            return [*problems, f"momentum is {beta!r}"], state
        if isinstance(rule.signal, Momentum) and rule.signal.form != method.form:
            times = 1 - float(beta) if method.form == "sum" else 1 / (1 - float(beta))
    for key, value in source.state.items():
        if key in COUNTERS:
            if not is_finite(value) or isinstance(value, Sequence):
                problems.append(f"{key} is {value!r}")
            else:
                state[key].fill_(float(value))
        elif not isinstance(value, Tensor) or not value.is_floating_point():
            problems.append(f"{key} is no tensor of real numbers but {type(value).__name__}")
        elif tuple(value.shape) != (shape := _shape(key, p, parts[0])):
            problems.append(f"{key} has shape {tuple(value.shape)}, not {shape}")
        elif problem := stray(value, p):
            problems.append(f"{key} {problem}: take a state_dict with full_state_dict=True (docs/checkpoints.md)")
        else:
            value = whole_of(value, p).to(plain(p.detach()).device, wide(p.dtype))
            _keep_(state, key, value * times if key == "momentum_buffer" else value, p, parts)
    return problems, state


def _shape(key: str, p: Tensor, piece: Piece) -> tuple[int, ...]:
    if key != ROWS:
        return tuple(p.shape)
    return (p.shape[0], *[1] * (p.ndim - 1)) if piece.layout.kind == "conv" else (*p.shape[:-1], 1)


def _keep_(state: dict[str, Tensor], key: str, value: Tensor, p: Tensor, parts: tuple[Piece, ...]) -> None:
    """Write `value` in the form state has it: of rows piece by piece, in int8 with its scales."""
    for piece, suffix in zip(parts, suffixes(parts), strict=True):
        if key == ROWS:
            target = state[key + suffix]
            target.copy_(piece.of(value.expand(p.shape))[..., :1].reshape(target.shape))
        elif state[key].dtype == torch.int8:
            codes, scales = encode(piece.of(value), seed=0)
            for target, made in ((piece.view(state[key]), codes), (state[key + SCALES + suffix], scales)):
                target.copy_(made.reshape(target.shape))
        else:
            state[key].copy_(value)


def _method_problems(method: Method, parts: tuple[Piece, ...], rule: Rule) -> list[str]:
    """Whether a parameter is read and scaled here as there."""
    shape = parts[0].shape
    try:
        theirs = pieces(method.layout(shape), shape)
    except ValueError as error:
        return [f"there it has a layout that does not fit: {error}"]
    if _cuts(theirs) != _cuts(parts):
        texts = [layout_text(of[0].layout) for of in (parts, theirs)]
        return [f"it is read by the layout {texts[0]!r} here and by {texts[1]!r} there; name that in a rule or its group"]
    for factor in (rule.scale.factor(*piece.blocks[1:]) for piece in parts):
        if method.factor is not None and not isclose(own := method.factor(shape), factor, rel_tol=1e-6):
            way_out = ': put it into a group with scale="none"' if own == 1 else ""
            return [f"an update is lr * {own:g} U V^T there and lr * {factor:g} U V^T here{way_out}"]
    return []


def _cuts(parts: tuple[Piece, ...]) -> list[tuple[Any, ...]]:
    """Which entries are which blocks, however the layout that says so is written."""
    layout = parts[0].layout
    whole = len(parts) == parts[0].parts == parts[0].heads == 1
    read = (layout.kind, layout.groups, layout.transpose, None if whole else layout.axis)
    return [(*read, piece.blocks, piece.offset, piece.parts, piece.size, piece.heads) for piece in parts]
