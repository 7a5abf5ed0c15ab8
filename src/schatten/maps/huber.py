"""Huber: small directions in proportion, large ones orthogonalised."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number


@dataclass(frozen=True)
class Huber(Thresholded):
    """K(S) = sum of huber(s), s^2/(2a) up to a and s - a/2 beyond; grad K = U min(s/a, 1) V^T.

    K*(X) = (a/2) ||X||_F^2 if the spectral norm of X is at most 1, infinity otherwise. Decoupled decay lambda makes a rule
    solve min F(W) + (a lambda / 2) ||W||_F^2 subject to ||W||_op <= 1/lambda. `a` and `relative` as in `Thresholded`.
    The kink at a costs the tower 10 % (relative to the direction, near s = a); `solver=svd()` is exact.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Huber(2.0, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([1.0, 5.0]))).diagonal().tolist()
        [0.5, 1.0]
    """

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return torch.where(s <= a, s * s / (2 * a), s - a / 2).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return (s / a).clamp(max=1)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return a / 2 * u.square().sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def problem(self, decay: float) -> str:
        ball = f"{norm_name(self.over, math.inf)} <= {number(1 / decay)}"
        return f" + {number(self.a * decay / 2)} * ||W||_F^2 subject to {ball}"

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        return torch.where(s <= a + tau, s * a / (a + tau), s - tau)
