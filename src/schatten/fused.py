"""A step in fewer passes where Triton's kernels run: equal matrices in one launch each, nothing stacked, nothing written twice.

What it knows is the common case: momentum, a polar factor by quintics, decoupled decay. A rule with other slots has those
that are known here computed so, and the others by their own torch operations; where nothing is known, or there is no
Triton, all of it is. Results are the same up to rounding.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from schatten import kernels
from schatten.batching import Part
from schatten.kernels import Bucket, Onto, Tables
from schatten.kernels.choice import on_triton
from schatten.layout import Piece
from schatten.maps import Nuclear
from schatten.retractions import DecoupledDecay
from schatten.retractions.core import decay_of, lr_of
from schatten.rounding import noisy
from schatten.rule import Rule, fits
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers.core import QuinticSolver, working_dtype
from schatten.state import LOST, Member

MOMENTUM = "momentum_buffer"

# What `polar_step_` allocates per entry, in units of one number of its precision: the signal or two iterates taking turns,
# X X^T and its polynomial, with room for fp16, whose signal waits in fp32 to be divided.
ITERATES = 6


def iterates_bytes(rule: Rule, p: Tensor) -> int | None:
    """Bytes per entry that `polar_step_` allocates for such parameters; None where it does not step them."""
    work = _precision(rule, p)
    return None if work is None else ITERATES * work.itemsize


def _precision(rule: Rule, p: Tensor) -> torch.dtype | None:
    """What the products of a polar step are multiplied in, if Triton can take the whole step."""
    if not on_triton(p, products=False):
        return None
    known = type(rule.signal) is Momentum and type(rule.retraction) is DecoupledDecay and type(rule.scale) is Scale
    if not known or type(rule.map) is not Nuclear or not fits(rule.map.solver, (QuinticSolver,)):
        return None
    work = working_dtype(p, rule.map.solver.dtype)  # type: ignore[attr-defined]
    return work if on_triton(p, work) else None


def polar_step_(whole: Part, rule: Rule, group: Mapping[str, Any], scale: Tensor | None, tables: Tables) -> bool:
    """Step equal blocks as `stepping.step_` does, if their whole step is known; else nothing is done and False returned.

    The gradient is read once, for momentum, signal and norm; the last product of the iteration goes into the weights.
    """
    p, (fan_out, fan_in) = whole.members[0].p, whole.blocks[1:]
    work = _precision(rule, p)
    if work is None:
        return False
    length = lr_of(group) * rule.scale.factor(fan_out, fan_in)
    onto, buckets = _onto(whole, length, rule, group, tables), _momentum_buckets(whole)
    if onto is None or buckets is None:
        return False
    from schatten.kernels import triton

    signal: Any = rule.signal
    solver: Any = rule.map.solver  # type: ignore[union-attr]
    S, norm = triton.momentum_(
        *buckets,
        _flags(whole),
        beta=group["momentum"],
        form=signal.form,
        nesterov=signal.nesterov,
        scale=scale,
        maximize=group["maximize"],
        # In bf16 a signal keeps its range, so it may wait there for its norm.
        dtype=torch.bfloat16 if work == torch.bfloat16 else torch.float32,
        wide=True,
        tables=tables,
    )
    form, quintics = solver.form(min(fan_out, fan_in), max(fan_out, fan_in), work, kernels.halves(p, work))
    last = partial(triton.affine_onto, onto=onto)
    # Without a name for the quotient, its memory is free after the first step of the iteration.
    X = [triton.quotient(S, norm, work)]
    del S
    form(X.pop(), quintics, last=last)
    _written(whole, MOMENTUM, weights=True)
    return True


def signals_(whole: Part, rule: Rule, group: Mapping[str, Any], scale: Tensor | None, tables: Tables) -> Tensor | None:
    """The signals of a batch (members, blocks, fan_out, fan_in), with their new state kept; None where that is not known."""
    if type(rule.signal) is not Momentum or not on_triton(whole.members[0].p, products=False):
        return None
    buckets = _momentum_buckets(whole)
    if buckets is None:
        return None
    from schatten.kernels import triton

    S, _ = triton.momentum_(
        *buckets,
        _flags(whole),
        beta=group["momentum"],
        form=rule.signal.form,
        nesterov=rule.signal.nesterov,
        scale=scale,
        maximize=group["maximize"],
        dtype=torch.float32,
        wide=False,
        tables=tables,
    )
    _written(whole, MOMENTUM)
    return S.view(len(whole), *whole.blocks)


def retract_(whole: Part, D: Tensor, length: float | Tensor, rule: Rule, group: Mapping[str, Any], tables: Tables) -> bool:
    """Take directions to the weights if that is known here; else nothing is done and False returned."""
    if type(rule.retraction) is not DecoupledDecay or not on_triton(whole.members[0].p, products=False):
        return False
    if isinstance(length, Tensor) and length.ndim > 0:
        return False
    onto = _onto(whole, length, rule, group, tables)
    if onto is None:
        return False
    from schatten.kernels import triton

    triton.retract_(D.reshape(-1, *D.shape[-2:]), onto)
    _written(whole, weights=True)
    return True


def _written(whole: Part, *names: str, weights: bool = False) -> None:
    """Tell autograd, which does not see what kernels write, and would use a graph's kept tensors with new values in them."""
    state = [m.state[name] for m in whole.members for name in names]
    increment_version([*state, *(m.p for m in whole.members if weights)])


def _flags(whole: Part) -> list[Tensor] | None:
    flags = [m.finite for m in whole.members if m.finite is not None]
    return flags or None


def _momentum_buckets(whole: Part) -> tuple[Bucket, Bucket] | None:
    members = whole.members
    if whole.rows is not None or not all(m.in_shape(MOMENTUM) and m.state[MOMENTUM].dtype == torch.float32 for m in members):
        return None
    G = bucket(members, [m.p.grad for m in members if m.p.grad is not None])
    M = bucket(members, [m.state[MOMENTUM] for m in members])
    return None if G is None or M is None else (G, M)


def _onto(whole: Part, length: float | Tensor, rule: Rule, group: Mapping[str, Any], tables: Tables) -> Onto | None:
    members = whole.members
    if whole.rows is not None or any(LOST in m.state for m in members):
        return None
    weights = bucket(members, [m.p.detach() for m in members])
    if weights is None:
        return None
    decay, retraction = decay_of(group), rule.retraction
    assert isinstance(retraction, DecoupledDecay)
    if retraction.form == "explicit":
        keep = 1 - decay
    else:
        keep = 1 / (1 + decay)
        length = length * keep
    noise = [(m.state["step"], m.own("weight")) for m in members] if noisy(members[0].p, group["rounding"]) else None
    return Onto(weights, keep, length, _flags(whole), noise, tables)


def bucket(members: Sequence[Member], tensors: Sequence[Tensor]) -> Bucket | None:
    """Tensors of the members' shapes as a bucket of their blocks; None where these are no views of equal strides."""
    piece, first = members[0].piece, tensors[0]
    if any(m.piece is not piece for m in members) or any(
        t.stride() != first.stride() or t.dtype != first.dtype for t in tensors
    ):
        return None
    place = _place(piece, tuple(first.shape), first.stride())
    return None if place is None else Bucket(tensors, piece.blocks, place[1], place[0])


@lru_cache(maxsize=4096)
def _place(piece: Piece, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, tuple[int, int, int]] | None:
    """Where blocks (blocks, fan_out, fan_in) begin in a tensor and what leads along them; None where they need a copy."""
    view = piece.view(torch.empty_strided(shape, stride, device="meta"))
    try:
        matrices = view.view(piece.blocks)
    except RuntimeError:
        return None
    b, m, n = matrices.stride()
    return int(matrices.storage_offset()), (b, m, n)
