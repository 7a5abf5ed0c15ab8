"""Gradients: what one rank can say of its part, and what all ranks say together."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.finite import finite_gradient
from schatten.placements.local import plain


def is_finite(p: Tensor, squares: bool, found_inf: Tensor | None) -> Tensor:
    """Whether this rank's part of a gradient is finite, as `finite.finite_gradient`; true where there is none."""
    # As it lies, which may not be as its parameter does: to bring it there would be a collective.
    grad = torch.zeros_like(plain(p.detach())) if p.grad is None else plain(p.grad.detach())
    holder = grad.detach()
    holder.grad = grad
    finite = finite_gradient(holder, squares)
    return finite if found_inf is None else finite & (found_inf.to(finite.device) == 0)


def is_elsewhere(p: Tensor) -> bool:
    """Whether a gradient is placed otherwise than its parameter, as tensor parallel leaves that of a replicated one."""
    return isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements


def on_all(finite: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Whether each gradient is finite on all ranks, on the device and without a look at it."""
    flags = torch.stack([f.reshape(()) for f in finite]).to(torch.int32)
    dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
    return list(flags.bool())
