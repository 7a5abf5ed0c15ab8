"""Log-smoothed: s/(s + a), whose constraint is a log barrier."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import each, norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number


@dataclass(frozen=True)
class LogSmoothed(Thresholded):
    """K(S) = sum of s - a log(1 + s/a); grad K = U s/(s + a) V^T.

    K*(X) = -a * sum of log(1-u) + u if the spectral norm of X is below 1, infinity otherwise. Decoupled decay lambda makes
    a rule solve min F(W) - (a/lambda) * sum of log(1 - lambda sigma) + lambda sigma, a barrier at ||W||_op = 1/lambda.
    `a` and `relative` as in `Thresholded`.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.LogSmoothed(1.0, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([3.0, 1.0]))).diagonal().tolist()
        [0.75, 0.5]
    """

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return (s - a * torch.log1p(s / a)).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return s / (s + a)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return -(a * (torch.log1p(-u.clamp(max=1)) + u)).sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def problem(self, decay: float) -> str:
        x = f"{number(decay)} {each(self.over)}"
        barrier = f"{number(self.a / decay)} * sum of (log(1 - {x}) + {x})"
        return f" - {barrier} subject to {norm_name(self.over, math.inf)} < {number(1 / decay)}"
