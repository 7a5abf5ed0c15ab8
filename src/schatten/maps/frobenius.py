"""The Frobenius norm: normalised momentum SGD."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.core import UNCONSTRAINED, Combinable
from schatten.maps.lifts import safe_norm
from schatten.maps.potential import ROUNDING, number


@dataclass(frozen=True)
class Frobenius(Combinable):
    """K(S) = ||S||_F; grad K(S) = S / ||S||_F (normalised SGD), 0 at 0.

    K*(X) = 0 if ||X||_F <= 1, infinity otherwise. Decoupled decay lambda makes a rule solve
    min F(W) subject to ||W||_F <= 1/lambda.

    Example:
        >>> import torch, schatten
        >>> schatten.maps.Frobenius().grad(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def value(self, S: Tensor) -> Tensor:
        """||S||_F in fp64, (*b, m, n) -> (*b)."""
        return safe_norm(S.double(), (-2, -1)).squeeze((-2, -1))

    def grad(self, S: Tensor) -> Tensor:
        """S / ||S||_F, (*b, m, n) -> (*b, m, n)."""
        wide = S if S.dtype in (torch.float32, torch.float64) else S.float()
        norm = safe_norm(wide, (-2, -1))
        return torch.where(norm == 0, 0, wide / torch.where(norm == 0, 1, norm)).to(S.dtype)

    def conjugate(self, X: Tensor) -> Tensor:
        """0 inside the unit Frobenius ball, infinity outside, (*b, m, n) -> (*b)."""
        return torch.where(self.violation(X) > 0, torch.inf, 0.0)

    def violation(self, X: Tensor) -> Tensor:
        """max(||X||_F - 1, 0), where an excess of fp64 rounding counts as none; (*b, m, n) -> (*b)."""
        norm = self.value(X)
        return torch.where(norm - 1 > ROUNDING * norm, norm - 1, 0.0)

    def prox(self, S: Tensor, tau: float) -> Tensor:
        """argmin over X of ||X||_F + ||X - S||_F^2 / (2 tau), in fp64: S, shorter by tau."""
        norm = safe_norm(S.double(), (-2, -1))
        return S.double() * (1 - tau / norm.clamp(min=tau))

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """The problem that decoupled decay makes a rule on this map solve."""
        if weight_decay == 0:
            return UNCONSTRAINED
        return f"min F subject to Frobenius norm <= {number(factor / weight_decay)}"
