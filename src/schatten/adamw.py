"""AdamW for the parameters no spectral rule takes: torch's own fused functional step, made to skip non-finite gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from schatten.finite import finite_gradient
from schatten.retractions.core import lr_of
from schatten.rounding import noisy, store_
from schatten.state import LOST, Member


def adamw_step_(m: Member, group: Mapping[str, Any], found_inf: Tensor | None, scale: Tensor | None) -> None:
    """One AdamW step of one parameter; a non-finite gradient leaves parameter and averages as they are and is counted.

    Half-precision parameters are stepped in fp32, their averages kept in fp32 (in bf16 an average with beta2 = 0.999
    never moves), and stored with the group's rounding. One call per parameter, because torch's fused step takes one
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
    # OneCycleLR and CyclicLR write `momentum` into every group when they cycle it; for AdamW that number is beta1.
    beta1, beta2 = group["betas"]
    adamw(
        [W],
        [grad.to(dtype).contiguous()],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=group.get("momentum", beta1),
        beta2=beta2,
        lr=lr_of(group),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
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
