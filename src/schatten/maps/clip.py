"""Clip: the projection on a spectral ball."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number


@dataclass(frozen=True)
class Clip(Thresholded):
    """K(S) = a times Huber's: sum of s^2/2 up to a and a s - a^2/2 beyond; grad K = U min(s, a) V^T.

    The direction is the projection of S on the spectral ball of radius a. K*(X) = ||X||_F^2 / 2 if the spectral norm of X
    is at most a, infinity otherwise. Decoupled decay lambda makes a rule solve
    min F(W) + (lambda/2) ||W||_F^2 subject to ||W||_op <= a/lambda. `a` and `relative` as in `Thresholded`. The kink at a
    costs the tower 10 % (relative to the direction, near s = a); `solver=svd()` is exact.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Clip(2.0, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([1.0, 5.0]))).diagonal().tolist()
        [1.0, 2.0]
    """

    @property
    def degree(self) -> float:
        return 1.0

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return torch.where(s <= a, s * s / 2, a * s - a * a / 2).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return torch.minimum(s, torch.as_tensor(a, dtype=s.dtype, device=s.device))

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.square().sum(-1) / 2

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - a

    def problem(self, decay: float) -> str:
        ball = f"{norm_name(self.over, math.inf)} <= {number(self.a / decay)}"
        return f" + {number(decay / 2)} * ||W||_F^2 subject to {ball}"

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        return torch.where(s <= a * (1 + tau), s / (1 + tau), s - tau * a)
