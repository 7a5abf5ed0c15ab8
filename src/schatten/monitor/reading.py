"""Reading: the matrices of an optimizer as quantities want them, one parameter whole at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.blockwise import decode
from schatten.diagnostics.core import Block
from schatten.diagnostics.hessian import Hessian
from schatten.layout import Piece, pieces
from schatten.optimizer import SpectralOptimizer
from schatten.placements.gather import total_norms, whole
from schatten.retractions import DecoupledDecay, decays_explicitly
from schatten.retractions.core import decay_of
from schatten.rule import Rule
from schatten.state import AVERAGES, SCALES, Member, suffixes, wide


class Place(NamedTuple):
    """A spectral parameter: its name and number in the optimizer, its group and rule, and how these read it."""

    name: str
    number: int
    p: Tensor
    group: Mapping[str, Any]
    rule: Rule
    pieces: Sequence[Piece]
    suffixes: Sequence[str]


def named(opt: SpectralOptimizer) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Every parameter with its name, "group.index" where the optimizer was not told any, and its group."""
    for g, group in enumerate(opt.param_groups):
        names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
        yield from ((name, p, group) for name, p in zip(names, group["params"], strict=True))


def places(opt: SpectralOptimizer) -> list[Place]:
    """Every spectral parameter that has entries."""
    found = []
    for number, (name, p, group) in enumerate(named(opt)):
        if group["algorithm"] == "spectral" and p.numel():
            own = pieces(group["layout"], p.shape)
            found.append(Place(name, number, p, group, opt.rule(group), own, suffixes(own)))
    return found


class Kept(NamedTuple):
    """A parameter and its average as they were before a step."""

    weight: Tensor
    average: Mapping[str, Tensor]


def kept(place: Place, state: Mapping[str, Tensor], momentum: bool) -> Kept:
    """Copies, of this rank's part where ranks divide the parameter."""
    average = {key: t.clone() for key, t in _average(place, state).items()} if momentum else {}
    return Kept(place.p.detach().clone(), average)


def with_gradients(all_places: Sequence[Place]) -> set[int]:
    """The numbers of parameters that have a gradient, here or, of those that ranks divide, on any rank."""
    divided = [place for place in all_places if isinstance(place.p, DTensor)]
    found = {place.number for place in all_places if place.p.grad is not None}
    if divided:
        has = [[(p.p, torch.tensor(float(p.number in found), dtype=torch.float64))] for p in divided]
        anywhere = total_norms(has, math.inf)
        found |= {p.number for p, flag in zip(divided, anywhere, strict=True) if float(flag) > 0}
    return found


def blocks(
    place: Place,
    needs: Iterable[str],
    state: Mapping[str, Tensor],
    *,
    gradient: Tensor | None = None,
    before: Kept | None = None,
    hessian: Hessian | None = None,
    index: int | None = None,
) -> Iterator[Block]:
    """A parameter's blocks with what `needs` names, each piece in turn.

    With `before` weight and momentum are what they were then, and the update is what has happened to the weight since. The
    `index` is the parameter's in `hessian`.
    """
    p, needs = place.p, set(needs)
    now = whole(p.detach())
    W = now if before is None else whole(before.weight)
    U = _update(place, W, now) if "update" in needs and before is not None else None
    average = _average(place, state) if before is None else before.average
    average = {key: whole(t) for key, t in average.items()} if "momentum" in needs else {}
    for piece, suffix in zip(place.pieces, place.suffixes, strict=True):
        yield Block(
            place.name + suffix,
            place.rule,
            place.group,
            piece.of(W).to(wide(W.dtype)),
            gradient=None if gradient is None else piece.of(gradient).to(wide(W.dtype)),
            momentum=_decoded(place, piece, suffix, average),
            update=None if U is None else piece.of(U),
            hessian=None if hessian is None or index is None or "hessian" not in needs else _within(hessian, index, piece),
        )


def gradient_of(place: Place, scale: Tensor | None) -> Tensor:
    """The gradient of what is minimised, divided by a GradScaler's `scale`; zeros of a part that only other ranks have."""
    p = place.p
    G = whole((torch.zeros_like(p) if p.grad is None else p.grad).detach())
    G = G if scale is None else G / scale.to(G)
    return -G if place.group["maximize"] else G


def _update(place: Place, W: Tensor, now: Tensor) -> Tensor:
    """What a step has added to W besides decay; zeros where it has left all of it."""
    change = now.to(wide(now.dtype)) - W.to(wide(W.dtype))
    retraction, decay = place.rule.retraction, decay_of(place.group)
    # A skipped parameter does not decay.
    moved = (change != 0).any()
    if decays_explicitly(retraction):
        change += W.to(change) * decay * moved
    elif isinstance(retraction, DecoupledDecay):
        change += now.to(change) * decay * moved
    return change


def _average(place: Place, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first running average that has the parameter's shape, with its scales where it is kept in bytes."""
    key = next((key for key in AVERAGES if key in state and state[key].shape == place.p.shape), None)
    return {} if key is None else {k: t for k, t in state.items() if k == key or k.startswith(key + SCALES)}


def _decoded(place: Place, piece: Piece, suffix: str, average: dict[str, Tensor]) -> Tensor | None:
    if not average:
        return None
    (key,) = [key for key in average if key in AVERAGES]
    member = Member(place.number, place.p, piece, suffix, average, None)
    M = member.matrices(key)
    return decode(M, member.matrices(key + SCALES)) if M.dtype == torch.int8 else M.to(wide(place.p.dtype))


def _within(hessian: Hessian, index: int, piece: Piece) -> Callable[[Tensor], Tensor]:
    """The product with one piece's part of a parameter's Hessian, in its blocks."""

    def product(V: Tensor) -> Tensor:
        full = torch.zeros_like(hessian.params[index], requires_grad=False)
        place = piece.view(full)
        place.copy_(V.reshape(place.shape))
        return piece.of(hessian.within(index, full))

    return product
