"""Soft threshold: large directions in proportion, small ones dropped."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Threshold, Thresholded, number


@dataclass(frozen=True)
class SoftThreshold(Thresholded):
    """K(S) = sum of max(s - a, 0)^2 / 2; grad K = U max(s - a, 0) V^T.

    K*(X) = ||X||_F^2 / 2 + a ||X||_nuc. Decoupled decay lambda makes a rule solve
    min F(W) + (lambda/2) ||W||_F^2 + a ||W||_nuc: weights of low rank. `a` and `relative` as in `Thresholded`.
    The tower is off by up to 1 % of the largest singular value for a below 0.1 of it and up to 7 % beyond, so directions
    below a are small but not 0; `solver=svd()` is exact.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.SoftThreshold(2.0, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([1.0, 5.0]))).diagonal().tolist()
        [0.0, 3.0]
    """

    @property
    def vanishes(self) -> bool:
        return True

    @property
    def degree(self) -> float:
        return 1.0

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return (s - a).clamp(min=0).square().sum(-1) / 2

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return (s - a).clamp(min=0)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.square().sum(-1) / 2 + a * u.sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return -u.new_ones(u.shape[:-1])

    def problem(self, decay: float) -> str:
        return f" + {number(decay / 2)} * ||W||_F^2 + {number(self.a)} * ({norm_name(self.over, 1)})"

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        return torch.where(s <= a, s, (s + tau * a) / (1 + tau))
