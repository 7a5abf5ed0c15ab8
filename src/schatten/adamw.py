"""AdamW for the parameters no spectral rule takes: torch's own fused functional step, made to skip non-finite gradients.

Where Triton's kernels run, one of them does the same for all parameters in one launch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from schatten.finite import counted, finite_gradient, looking_is_free, usable
from schatten.kernels import Tables
from schatten.kernels.choice import on_triton
from schatten.retractions.core import lr_of
from schatten.rounding import noisy, store_
from schatten.state import LOST, Member


def adamw_steps_(
    members: Sequence[Member], group: Mapping[str, Any], found_inf: Tensor | None, scale: Tensor | None, tables: Tables
) -> None:
    """One AdamW step of parameters whose gradients nobody has looked at, as many as possible in one call."""
    alike: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    for m in members:
        alike[_kind(m, scale)].append(m)
    for (how, *_), own in alike.items():
        if how == "kernel":
            _in_one_launch_(own, group, found_inf, scale, tables)
        elif how == "call":
            _in_one_call_(own, group, found_inf)
        else:
            for m in own:
                adamw_step_(m, group, found_inf, scale)


def _kind(m: Member, scale: Tensor | None) -> tuple[object, ...]:
    """How a parameter can be stepped, first, and what it shares with those it can be stepped with."""
    p, grad = m.p, m.p.grad
    assert grad is not None
    if LOST in m.state or not p.is_contiguous() or not grad.is_contiguous():
        return ("alone",)
    kind = p.device, p.dtype, grad.dtype
    if m.state["exp_avg"].dtype == torch.float32 and on_triton(p, products=False):
        return ("kernel", *kind)
    if looking_is_free(p) and scale is None and p.dtype == grad.dtype == m.state["exp_avg"].dtype:
        return ("call", *kind)
    return ("alone",)


def _in_one_launch_(
    members: Sequence[Member], group: Mapping[str, Any], found_inf: Tensor | None, scale: Tensor | None, tables: Tables
) -> None:
    from schatten.kernels import triton

    states = [m.state for m in members]
    found = counted([m.p for m in members], states, found_inf, squared=True)
    moved = [(m, finite) for m, (moved, finite) in zip(members, found, strict=True) if moved]
    if not moved:
        return
    own, flags = [m for m, _ in moved], [finite for _, finite in moved if finite is not None]
    beta1, beta2 = _betas(group)
    triton.adamw_(
        [m.p.detach() for m in own],
        [m.p.grad for m in own if m.p.grad is not None],
        [m.state["exp_avg"] for m in own],
        [m.state["exp_avg_sq"] for m in own],
        [m.state["step"] for m in own],
        flags or None,
        lr=lr_of(group),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        scale=scale,
        noise=[(m.state["step"], m.own("weight")) for m in own] if noisy(own[0].p, group["rounding"]) else None,
        tables=tables,
    )
    # Autograd does not see what kernels write.
    increment_version([t for m in own for t in (m.p, m.state["exp_avg"], m.state["exp_avg_sq"])])


def _in_one_call_(members: Sequence[Member], group: Mapping[str, Any], found_inf: Tensor | None) -> None:
    own = []
    for m in members:
        if usable(m.p, found_inf, squared=True):
            own.append(m)
        else:
            m.state["skipped"].add_(1)
    if own:
        _fused_([m.p for m in own], [m.p.grad for m in own if m.p.grad is not None], [m.state for m in own], None, group)


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    # OneCycleLR and CyclicLR write `momentum` into every group when they cycle it; for AdamW that number is beta1.
    beta1, beta2 = group["betas"]
    return group.get("momentum", beta1), beta2


def _fused_(
    weights: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], skip: Tensor | None, group: Mapping[str, Any]
) -> None:
    beta1, beta2 = _betas(group)
    adamw(
        weights,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr_of(group),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def adamw_step_(m: Member, group: Mapping[str, Any], found_inf: Tensor | None, scale: Tensor | None) -> None:
    """One AdamW step of one parameter; a non-finite gradient leaves parameter and averages as they are and is counted.

    Half-precision parameters are stepped in fp32, their averages kept in fp32 (in bf16 an average with beta2 = 0.999
    never moves), and stored with the group's rounding. One call for this parameter, because torch's fused step takes one
    `found_inf` for all tensors of a call: a bad gradient must not stop the others, and looking at it here would make
    the device wait; a member's flag, on which ranks have agreed, decides where there is one. `found_inf` and `scale` are
    a GradScaler's; gradients are divided by the latter, in a copy.
    """
    p, state = m.p, m.state
    grad = p.grad
    assert grad is not None
    dtype = state["exp_avg"].dtype
    # One square beyond the range would stop its entry for good.
    bad = ~finite_gradient(p, squared=True) if m.finite is None else ~m.finite
    skip = (bad if found_inf is None else bad | (found_inf.to(bad.device) != 0)).float()
    if scale is not None:
        grad = grad.to(dtype) / scale.to(dtype)
    # torch's fused kernel walks memory without looking at strides: all of its tensors must be contiguous.
    W = p if p.dtype == dtype and p.is_contiguous() else p.detach().to(dtype).contiguous()
    lost = state.get(LOST)
    if lost is not None:
        W = W + lost
    _fused_([W], [grad.to(dtype).contiguous()], [state], skip, group)
    state["skipped"].add_(skip)
    if W is p:
        return
    seed = m.seed("weight") if noisy(p, group["rounding"]) else 0
    if lost is None:
        store_(p, W, group["rounding"], seed)
        return
    rounded, missed = torch.empty_like(p), torch.empty_like(lost)
    store_(rounded, W, group["rounding"], seed, missed)
    # A skipped step rounds p + lost anew, which at a tie need not give p again.
    p.copy_(torch.where(skip == 0, rounded, p))
    lost.copy_(torch.where(skip == 0, missed, lost))
