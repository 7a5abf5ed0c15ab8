"""AdamW for the parameters no spectral rule takes: torch's own fused functional step, made to skip non-finite gradients."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from schatten.retractions.core import lr_of
from schatten.rounding import store_

STATE_KEYS = ("exp_avg", "exp_avg_sq")


def adamw_step_(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], seed: int) -> None:
    """One AdamW step of one parameter; a non-finite gradient leaves parameter and averages as they are and is counted.

    Half-precision parameters are stepped in fp32, their averages kept in fp32 (in bf16 an average with beta2 = 0.999
    never moves), and stored with the group's rounding. One call per parameter, because torch's fused step takes one
    `found_inf` for all tensors of a call: a bad gradient must not stop the others, and looking at it here would make
    the device wait.
    """
    grad = p.grad
    assert grad is not None
    dtype = state["exp_avg"].dtype
    found_inf = (~grad.sum(dtype=dtype).isfinite()).float()
    # torch's fused kernel walks memory without looking at strides: all of its tensors must be contiguous.
    W = p if p.dtype == dtype and p.is_contiguous() else p.detach().to(dtype).contiguous()
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
        found_inf=found_inf,
        amsgrad=False,
        beta1=group.get("momentum", beta1),
        beta2=beta2,
        lr=lr_of(group),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    state["skipped"].add_(found_inf)
    if W is not p:
        store_(p, W, group["rounding"], seed)
