"""Stepping: the slots of a rule on a batch of equal blocks, the signal and the retraction part by part.

On one device a step is `step_`: signals, the direction on all blocks at once, the retraction. Where parameters lie on
several ranks the middle happens elsewhere, or an owner that has everything takes `whole_step` on tensors.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from schatten import fused
from schatten.batching import Part, Room, parts, places
from schatten.kernels import Tables
from schatten.retractions.core import lr_of
from schatten.rule import Rule

if TYPE_CHECKING:
    from schatten.metrics import Recorder


def signals_(
    whole: Part, rule: Rule, group: Mapping[str, Any], room: Room, scale: Tensor | None, *, keep: bool = True
) -> Tensor:
    """The signals of equal blocks, (members, blocks, fan_out, fan_in), whose new state is kept unless `keep` is False.

    `scale` is a GradScaler's. The result may lie in `room`, until the next batch.
    """
    if keep and (made := fused.signals_(whole, rule, group, scale, room.tables)) is not None:
        return made
    own = _parts(whole, rule)
    S = None
    for part, at in places(own):
        signal, new_state = rule.signal(part.gradients(group["maximize"], scale), part.state(), group)
        if keep:
            part.keep_state_(new_state)
        if len(own) == 1:
            S = signal
        else:
            S = room.like(signal, (len(whole), *whole.blocks)) if S is None else S
            part.of(S[at]).copy_(signal)
    assert S is not None
    return S


def retract_(
    whole: Part, D: Tensor, length: float | Tensor, rule: Rule, group: Mapping[str, Any], tables: Tables | None = None
) -> None:
    """Take directions D to the weights; `length` multiplies D, a number or one for each block."""
    if fused.retract_(whole, D, length, rule, group, tables or Tables()):
        return
    for part, at in places(_parts(whole, rule)):
        at_length = length[at] if isinstance(length, Tensor) and length.ndim > 0 else length
        W, new_state = rule.retraction(part.weights(), part.of(D[at]), at_length, part.state(), group)
        part.keep_state_(new_state)
        part.keep_weights_(W, group["rounding"])


def step_(
    whole: Part, rule: Rule, group: Mapping[str, Any], room: Room, scale: Tensor | None, recorder: "Recorder | None"
) -> None:
    """Step equal blocks that are here: signal and retraction part by part, the map on all of them at once."""
    if recorder is None and fused.polar_step_(whole, rule, group, scale, room.tables):
        return
    S = signals_(whole, rule, group, room, scale)
    D, new_state = rule.direction(S, whole.state(), group)
    whole.keep_state_(new_state)
    length = lr_of(group) * rule.scale(D)
    if recorder is not None:
        recorder.direction([(m.number, m.suffix) for m in whole.members], D, length, rule)
    retract_(whole, D, length, rule, group, room.tables)


def _parts(whole: Part, rule: Rule) -> list[Part]:
    return parts(whole, rule.signal.elementwise and rule.retraction.elementwise)


class Stepped(NamedTuple):
    """New weights (members, blocks, fan_out, fan_in), the directions that led there with their length, and new state."""

    W: Tensor
    D: Tensor
    length: float | Tensor
    state: dict[str, Tensor]


def whole_step(
    W: Tensor, G: Tensor, state: Mapping[str, Tensor], rule: Rule, group: Mapping[str, Any], scale: Tensor | None
) -> Stepped:
    """One step of whole matrices given as tensors; nothing is written to."""
    if scale is not None:
        G = G / scale.to(G)
    S, new = rule.signal(-G if group["maximize"] else G, state, group)
    D, of_direction = rule.direction(S, {**state, **new}, group)
    length = lr_of(group) * rule.scale(D)
    W, of_retraction = rule.retraction(W, D, length, {**state, **new, **of_direction}, group)
    return Stepped(W, D, length, {**new, **of_direction, **of_retraction})
