"""The nuclear norm: Muon's K."""

from dataclasses import dataclass, field
from types import FunctionType
from typing import ClassVar

import torch
from torch import Tensor

from schatten.maps.core import UNCONSTRAINED, Combinable
from schatten.maps.lifts import magnitudes, replaced
from schatten.maps.potential import ROUNDING, number
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class Nuclear(Combinable):
    """K(S) = sum of the singular values of S; grad K(S) = U V^T, the polar factor (Muon's direction).

    K*(X) = 0 if the spectral norm of X is at most 1, infinity otherwise. With decoupled decay lambda and shape factor c
    a rule on this map solves min F(W) subject to ||W||_op <= c / lambda (Chen, Li and Liu, arXiv 2506.15054, eq. 5).

    `solver` computes the polar factor and fixes how exact the direction is; `value`, `conjugate` and `violation` are
    computed from singular values in fp64. Rank-deficient directions get the subgradient 0.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Nuclear(schatten.solvers.svd())
        >>> S = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(K.value(S)), bool(torch.allclose(K.grad(S), torch.eye(2)))
        (7.0, True)
    """

    over: ClassVar[str] = "spectrum"

    solver: Solver = field(default_factory=polynomial)

    def __post_init__(self) -> None:
        # A builder that was not called is callable too, and would fail only in the first step.
        if not isinstance(self.solver, Solver) or isinstance(self.solver, FunctionType | type):
            raise TypeError(f"solver must be built, as schatten.solvers.polynomial() is; got {self.solver!r}.")

    def value(self, S: Tensor) -> Tensor:
        """The nuclear norm, (*b, m, n) -> (*b)."""
        return magnitudes(S.double(), "spectrum").sum(-1)

    def grad(self, S: Tensor) -> Tensor:
        """U V^T by the map's solver, (*b, m, n) -> (*b, m, n)."""
        return self.solver(S)

    def conjugate(self, X: Tensor) -> Tensor:
        """0 inside the unit spectral ball, infinity outside, (*b, m, n) -> (*b)."""
        return torch.where(self.violation(X) > 0, torch.inf, 0.0)

    def violation(self, X: Tensor) -> Tensor:
        """max(||X||_op - 1, 0), where an excess of fp64 rounding counts as none; (*b, m, n) -> (*b)."""
        u = magnitudes(X.double(), "spectrum")
        excess = u.amax(-1) - 1
        return torch.where(excess > ROUNDING * u.sum(-1), excess, 0.0)

    def prox(self, S: Tensor, tau: float) -> Tensor:
        """argmin over X of ||X||_nuc + ||X - S||_F^2 / (2 tau), in fp64: singular values less tau."""
        return replaced(S.double(), "spectrum", lambda s: (s - tau).clamp(min=0))

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """The problem that decoupled decay makes a rule on this map solve."""
        if weight_decay == 0:
            return UNCONSTRAINED
        return f"min F subject to spectral norm <= {number(factor / weight_decay)}"
