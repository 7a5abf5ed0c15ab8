"""The Schatten norms: from the nuclear norm (p = 1) over the Frobenius (2) to the spectral norm (infinity)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schatten.maps.lifts import norm_name
from schatten.maps.potential import Potential, Threshold, bisected, largest, number
from schatten.solvers import FunctionSolver, svd, tower
from schatten.solvers.power_function import PowerFunction


@dataclass(frozen=True)
class Schatten(Potential):
    """K(S) = (sum of s^p)^(1/p), 1 <= p <= infinity, with 1/p + 1/q = 1; grad K = U s^(p-1) V^T / K(S)^(p-1).

    K*(X) = 0 if the Schatten-q norm of X is at most 1, infinity otherwise. Decoupled decay lambda makes a rule solve
    min F(W) subject to Schatten-q norm of W <= 1/lambda. p = 1 is `Nuclear`, p = 2 `Frobenius`; p = infinity is the
    spectral norm, whose gradient is the leading u v^T (shared equally between equal leading singular values) and whose
    constraint is a nuclear norm.

    For 1 < p <= 2 the default solver is the tower of the power p - 1; for p = 1 and p > 2 it is the exact `svd()`.

    Raises ValueError for p < 1.

    Example:
        >>> import torch, schatten
        >>> schatten.maps.Schatten(float("inf")).grad(torch.diag(torch.tensor([1.0, 3.0]))).diagonal().tolist()
        [0.0, 1.0]
    """

    p: float = 2.0
    solver: FunctionSolver = field(default=None, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not self.p >= 1:
            raise ValueError(f"Schatten needs p >= 1, got p={self.p!r}; powers of the singular values are Power(p).")
        object.__setattr__(self, "p", float(self.p))
        if self.solver is None:
            object.__setattr__(self, "solver", tower() if 1 < self.p <= 2 else svd())
        super().__post_init__()

    @property
    def q(self) -> float:
        """The dual exponent."""
        return math.inf if self.p == 1 else 1.0 if self.p == math.inf else self.p / (self.p - 1)

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return _norm(s, self.p)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        top = largest(s).unsqueeze(-1)
        x = s / torch.where(top == 0, 1, top)
        if self.p == math.inf:
            tied = (x > 1 - 1e-9).to(s.dtype) * (top > 0)
            return tied / tied.sum(-1, keepdim=True).clamp(min=1)
        if self.p == 1:
            return (s > 0).to(s.dtype)
        norm = _norm(x, self.p).unsqueeze(-1)
        return (x / torch.where(norm == 0, 1, norm)).pow(self.p - 1)

    def check_solver(self) -> None:
        super().check_solver()
        if self.over == "spectrum" and 1 < self.p < math.inf:
            self.solver.check(PowerFunction(self.p - 1))

    def grad(self, S: Tensor) -> Tensor:
        """The direction; for finite p > 1 from one spectral power P = U s^(p-1) V^T, as <S, P> = sum of s^p."""
        if self.over != "spectrum" or not 1 < self.p < math.inf:
            return super().grad(S)
        wide = S if S.dtype in (torch.float32, torch.float64) else S.float()
        top = wide.abs().amax((-2, -1), keepdim=True)
        X = wide / torch.where((top == 0) | ~top.isfinite(), 1, top)
        P = self.solver.apply(X, PowerFunction(self.p - 1))
        sum_ = (X * P).sum((-2, -1), keepdim=True)
        return torch.where(sum_ == 0, 0, P / torch.where(sum_ == 0, 1, sum_).pow(1 - 1 / self.p)).to(S.dtype)

    @property
    def rank(self) -> int | None:
        return 1 if self.p == math.inf else None

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.new_zeros(u.shape[:-1])

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return _norm(u, self.q) - 1

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        if self.p == math.inf:
            # x = min(s, level), the level such that what is cut off adds up to tau.
            level = bisected(lambda x: (s - x).clamp(min=0).sum(-1, keepdim=True) > tau, largest(s).unsqueeze(-1))
            return torch.minimum(s, level)
        if self.p == 1:
            return (s - tau).clamp(min=0)

        def at(norm: Tensor) -> Tensor:
            # x + tau (x / norm)^(p - 1) = s, whose left side grows with x.
            return bisected(lambda x: x + tau * (x / norm).pow(self.p - 1) < s, s)

        # The norm that the x it leads to has; above it x is too short.
        norm = bisected(lambda x: _norm(at(x), self.p).unsqueeze(-1) > x, _norm(s, self.p).unsqueeze(-1))
        return torch.where(norm > 0, at(torch.where(norm > 0, norm, 1)), 0)

    def problem(self, decay: float) -> str:
        return f" subject to {norm_name(self.over, self.q)} <= {number(1 / decay)}"


def _norm(s: Tensor, p: float) -> Tensor:
    top = largest(s)
    unit = torch.where(top == 0, 1, top)
    return unit * torch.linalg.vector_norm(s / unit.unsqueeze(-1), ord=p, dim=-1)
