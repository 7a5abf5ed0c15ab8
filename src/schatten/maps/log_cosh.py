"""Log-cosh: the hyperbolic tangent (entropy)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.lifts import each, norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number


@dataclass(frozen=True)
class LogCosh(Thresholded):
    """K(S) = a * sum of log cosh(s/a); grad K = U tanh(s/a) V^T.

    K*(X) = (a/2) * sum of (1+u) log(1+u) + (1-u) log(1-u) if the spectral norm of X is at most 1, infinity otherwise.
    Decoupled decay lambda makes a rule solve min F(W) + K*(lambda W)/lambda, an entropy, subject to
    ||W||_op <= 1/lambda. `a` and `relative` as in `Thresholded`.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.LogCosh(1.0, solver=schatten.solvers.svd())
        >>> round(float(K.grad(torch.tensor([[0.5]]))), 4)
        0.4621
    """

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        # log cosh x = x - log 2 + log(1 + exp(-2x)), which does not overflow.
        x = s / a
        return (a * (x - math.log(2) + torch.log1p(torch.exp(-2 * x)))).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return torch.tanh(s / a)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return a / 2 * (torch.xlogy(1 + u, 1 + u) + torch.xlogy(1 - u, (1 - u).clamp(min=0))).sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def problem(self, decay: float) -> str:
        x = f"{number(decay)} {each(self.over)}"
        entropy = f"{number(self.a / decay / 2)} * sum of (1 + u) log(1 + u) + (1 - u) log(1 - u), u = {x},"
        return f" + {entropy} subject to {norm_name(self.over, math.inf)} <= {number(1 / decay)}"
