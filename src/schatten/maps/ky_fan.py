"""Ky Fan norms: the k leading directions only (Neon, Fanions)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Potential, Threshold, bisected, largest, number
from schatten.solvers import FunctionSolver, krylov


@dataclass(frozen=True)
class KyFan(Potential):
    """K(S) = sum of the `count` largest singular values; grad K = sum over i <= count of u_i v_i^T (1 is Neon's).

    K*(X) = 0 if the spectral norm of X is at most 1 and its nuclear norm at most `count`, infinity otherwise: both bind,
    the second on flat spectra, the first on sparse ones. Decoupled decay lambda makes a rule solve
    min F(W) subject to ||W||_op <= 1/lambda and ||W||_nuc <= count/lambda. From min(m, n) on this is `Nuclear`.

    A jump between two singular values has no polynomial: the default solver finds the leading singular vectors in a
    block Krylov space, `krylov()`; `svd()` is exact.

    Raises ValueError for count < 1.

    Example:
        >>> import torch, schatten
        >>> schatten.maps.KyFan(1).grad(torch.diag(torch.tensor([1.0, 3.0]))).abs().round().diagonal().tolist()
        [0.0, 1.0]
    """

    count: int = 1
    solver: FunctionSolver = field(default_factory=krylov, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"KyFan needs a whole count >= 1 of singular values, got count={self.count!r}.")
        super().__post_init__()

    @property
    def rank(self) -> int:
        return self.count

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return s.topk(min(self.count, s.shape[-1]), dim=-1).values.sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        top = s.topk(min(self.count, s.shape[-1]), dim=-1).indices
        return torch.zeros_like(s).scatter(-1, top, 1) * (s > 0)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.new_zeros(u.shape[:-1])

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return torch.maximum(largest(u) - 1, u.sum(-1) / self.count - 1)

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        # Moreau: s less tau times the projection of s / tau on {v <= 1, sum v <= count}, a shift by bisection.
        z = s / tau
        shift = bisected(lambda x: (z - x).clamp(0, 1).sum(-1, keepdim=True) > self.count, largest(z).unsqueeze(-1))
        return s - tau * (z - shift).clamp(0, 1)

    def problem(self, decay: float) -> str:
        ball = f"{norm_name(self.over, math.inf)} <= {number(1 / decay)}"
        return f" subject to {ball} and {norm_name(self.over, 1)} <= {number(self.count / decay)}"
