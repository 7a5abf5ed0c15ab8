"""Pseudo-Huber: a smooth step from proportion to full length (relativistic, soft-Huber)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import each, norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number


@dataclass(frozen=True)
class PseudoHuber(Thresholded):
    """K(S) = sum of sqrt(s^2 + a^2) - a; grad K = U s/sqrt(s^2 + a^2) V^T = (S S^T + a^2 I)^(-1/2) S.

    K*(X) = a * sum of (1 - sqrt(1 - u^2)) if the spectral norm of X is at most 1, infinity otherwise. Decoupled decay
    lambda makes a rule solve min F(W) + (a/lambda) * sum of (1 - sqrt(1 - lambda^2 sigma^2)) subject to
    ||W||_op <= 1/lambda. `a` and `relative` as in `Thresholded`.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.PseudoHuber(4.0, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([3.0, 0.0]))).diagonal().tolist()
        [0.6000000238418579, 0.0]
    """

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        # s^2 / (root + a) is root - a without its cancellation.
        return (s * s / (_hypot(s, a) + a)).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return s / _hypot(s, a)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        root = (1 - u * u).clamp(min=0).sqrt()
        return (a * u * u / (1 + root)).sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def problem(self, decay: float) -> str:
        x = each(self.over)
        regulariser = f"{number(self.a / decay)} * sum of (1 - sqrt(1 - {number(decay**2)} {x}^2))"
        return f" + {regulariser} subject to {norm_name(self.over, math.inf)} <= {number(1 / decay)}"


def _hypot(s: Tensor, a: Threshold) -> Tensor:
    return torch.hypot(s, torch.as_tensor(a, dtype=s.dtype, device=s.device))
