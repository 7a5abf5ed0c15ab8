"""A fixed Frobenius norm instead of weight decay: Hyperball."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.maps.lifts import safe_norm
from schatten.retractions.core import State, Stateless, lr_of


@dataclass(frozen=True)
class FixedNorm(Stateless):
    """W' = W - lr R D / ||D||_F,  W <- R W' / ||W'||_F with R = ||W_0||_F (Hyperball, arXiv 2606.16899).

    lr is the angle of a step: neither a shape factor nor weight_decay is used. R is read at the first step of each matrix
    and kept (state: one number per matrix), so rounding cannot make it drift. A matrix that is zero has no direction to
    keep and would never move: its norm is not fixed until it is nonzero, and its step is -lr D. D = 0 leaves W alone.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.FixedNorm()
        >>> W, D = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> W, state = retract(W, D, length=1.0, state=retract.init(W), group={"lr": 0.8})
        >>> W.flatten().tolist()
        [5.0, 0.0]
    """

    elementwise: ClassVar[bool] = False

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"radius": W.new_zeros(*W.shape[:-2], 1, 1)}

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        size = norm(D)
        radius = torch.where(state["radius"] > 0, state["radius"], norm(W))
        moved = W - torch.where(radius > 0, unit(D) * radius, D) * lr_of(group)
        # A factor of 1 changes no bit; where it overflows, the weight is divided by its size first.
        factor = radius / norm(moved)
        back = torch.where(factor.isfinite(), moved * factor, unit(moved) * radius)
        return torch.where((radius > 0) & (size > 0), back, moved), {"radius": radius}


def norm(X: Tensor) -> Tensor:
    """Frobenius norms, (*b, m, n) -> (*b, 1, 1)."""
    return safe_norm(X, (-2, -1))


def unit(X: Tensor) -> Tensor:
    """X at Frobenius norm 1, and 0 where that is 0."""
    size = norm(X)
    return torch.where(size > 0, X / size, 0.0)
