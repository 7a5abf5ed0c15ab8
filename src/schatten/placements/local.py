"""Local: what one rank has of a parameter, as plain tensors, and the way a batch may see it.

In-place writes on these tensors are writes to the shard. An element-wise slot does not care what its matrix is a piece of,
so a shard is one matrix to it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.layout import pieces
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import Traveller
from schatten.state import COUNTERS, LOST, Member

# Keeps the noise of shards apart, as it depends on the parameter's number and the place in the tensor.
PER_SHARD = 0x51ED27


class Local(NamedTuple):
    """A parameter that this step may move: its own part `p`, plain and with its gradient, of state too, and a flag on the
    device that decides; None where it moves for sure.
    """

    traveller: Traveller
    p: Tensor
    state: Mapping[str, Tensor]
    finite: Tensor | None


def plain(t: Tensor) -> Tensor:
    """A rank's own part of a DTensor, any other tensor as it is; the memory is shared."""
    return t.to_local() if isinstance(t, DTensor) else t


def plain_parameter(p: Tensor) -> Tensor:
    """A rank's own part of a parameter, its gradient that of `p`, or zeros where that is missing."""
    own = plain(p.detach())
    if p.grad is None:
        own.grad = torch.zeros_like(own)
        return own
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    own.grad = plain(grad)
    return own


def signal_members(local: Local, rank: int) -> list[Member]:
    """What the signal of this rank's part is computed on: pieces of a whole parameter, or the shard that state covers."""
    t = local.traveller
    if t.averages.replicated:
        return _whole_pieces(local)
    p = local.p
    if t.weights.replicated:  # state is sharded and the parameter is not
        p = _part(local.p, t.averages, rank)
        assert local.p.grad is not None
        p.grad = _part(local.p.grad, t.averages, rank)
    return _shard(local, p, {key: value for key, value in local.state.items() if key != LOST}, t.averages, rank)


def weight_members(local: Local, rank: int) -> list[Member]:
    """What the retraction of this rank's part is computed on."""
    t = local.traveller
    if t.weights.replicated:
        return _whole_pieces(local)
    return _shard(local, local.p, local.state, t.weights, rank)


def _whole_pieces(local: Local) -> list[Member]:
    t = local.traveller
    return [
        Member(t.number, local.p, piece, suffix, dict(local.state), local.finite)
        for piece, suffix in zip(t.pieces, t.suffixes, strict=True)
    ]


def _shard(local: Local, p: Tensor, state: Mapping[str, Tensor], on: Arrangement, rank: int) -> list[Member]:
    if not p.numel():
        return []
    t = local.traveller
    number = shard_number(t.number, on, rank)
    counters = {key: state[key] for key in COUNTERS}
    entries = {key: value for key, value in state.items() if t.state.get(key) == t.shape}
    assert p.grad is not None
    if p.ndim > 1 and all(x.is_contiguous() for x in (p, p.grad, *entries.values())):
        # Rows, so that a large shard is cut where the cache ends.
        p, grad = p.view(-1, p.shape[-1]), p.grad.view(-1, p.shape[-1])
        p.grad = grad
        entries = {key: value.view(p.shape) for key, value in entries.items()}
        (piece,) = pieces("matrix", p.shape)
    else:
        (piece,) = pieces("flat", p.shape)
    return [Member(number, p, piece, "", {**entries, **counters}, local.finite)]


def shard_number(number: int, on: Arrangement, rank: int) -> int:
    """A parameter's number for the noise of one shard, the same for all copies of that."""
    return number + PER_SHARD * on.same_copy(rank).index(rank)


def _part(t: Tensor, on: Arrangement, rank: int) -> Tensor:
    (rows, *_) = on.held(t.shape, rank)
    assert isinstance(rows, range)
    return t.narrow(0, rows.start, len(rows))
