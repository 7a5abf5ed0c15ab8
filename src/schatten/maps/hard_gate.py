"""Hard gate: only directions above a threshold, all at full length."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Threshold, Thresholded, largest, number
from schatten.solvers import FunctionSolver, svd


@dataclass(frozen=True)
class HardGate(Thresholded):
    """K(S) = sum of max(s - a, 0); grad K = U 1[s > a] V^T, a subgradient where a singular value equals a.

    K*(X) = a ||X||_nuc if the spectral norm of X is at most 1, infinity otherwise. Decoupled decay lambda makes a rule
    solve min F(W) + a ||W||_nuc subject to ||W||_op <= 1/lambda. `a` and `relative` as in `Thresholded`. A jump has no
    polynomial, so the default solver is the exact one, `svd()`; `tower()` is refused.

    Example:
        >>> import torch, schatten
        >>> schatten.maps.HardGate(2.0).grad(torch.diag(torch.tensor([1.0, 5.0]))).diagonal().tolist()
        [0.0, 1.0]
    """

    solver: FunctionSolver = field(default_factory=svd, kw_only=True)

    @property
    def vanishes(self) -> bool:
        return True

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return (s - a).clamp(min=0).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return (s > a).to(s.dtype)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return a * u.sum(-1)

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def problem(self, decay: float) -> str:
        ball = f"{norm_name(self.over, math.inf)} <= {number(1 / decay)}"
        return f" + {number(self.a)} * ({norm_name(self.over, 1)}) subject to {ball}"

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        return torch.where(s <= a, s, torch.maximum(s - tau, torch.as_tensor(a, dtype=s.dtype)))
