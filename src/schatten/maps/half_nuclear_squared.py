"""Half the squared nuclear norm: Muon's direction at the length of the signal (PolarGrad)."""

import math
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Potential, Threshold, bisected, largest, number
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class HalfNuclearSquared(Potential):
    """K(S) = ||S||_nuc^2 / 2; grad K = ||S||_nuc U V^T (PolarGrad, Lau et al., arXiv 2505.21799).

    K*(X) = ||X||_op^2 / 2. Decoupled decay lambda makes a rule solve min F(W) + (lambda/2) ||W||_op^2. The direction
    vanishes with the gradient, unlike Muon's. `solver` computes the polar factor P, and ||S||_nuc is <S, P>.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.HalfNuclearSquared(solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([1.0, 3.0]))).diagonal().tolist()
        [4.0, 4.0]
    """

    solver: Solver = field(default_factory=polynomial, kw_only=True)  # type: ignore[assignment]

    def check_solver(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, FunctionType | type):
            raise TypeError(f"solver must be built, as schatten.solvers.polynomial() is; got {self.solver!r}.")

    @property
    def degree(self) -> float:
        return 1.0

    def grad(self, S: Tensor) -> Tensor:
        """<S, P> P with the polar factor P of S."""
        if self.over != "spectrum":
            return super().grad(S)
        wide = S if S.dtype in (torch.float32, torch.float64) else S.float()
        P = self.solver(wide)
        return ((wide * P).sum((-2, -1), keepdim=True) * P).to(S.dtype)

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return s.sum(-1).square() / 2

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return s.sum(-1, keepdim=True) * (s > 0)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u).square() / 2

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return -u.new_ones(u.shape[:-1])

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        # x = (s - theta)_+ with theta = tau sum x.
        theta = bisected(lambda t: tau * (s - t).clamp(min=0).sum(-1, keepdim=True) > t, largest(s).unsqueeze(-1))
        return (s - theta).clamp(min=0)

    def problem(self, decay: float) -> str:
        return f" + {number(decay / 2)} * ({norm_name(self.over, math.inf)})^2"
