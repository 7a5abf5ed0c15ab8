"""What potentials share: the four verbs of a matrix from four functions of its magnitudes.

A subclass is a frozen dataclass with the fields it needs and says, for non-negative magnitudes s and u of shape (*b, r):
`k(s, a)`, its gradient `h(s, a)`, the finite part of the conjugate `k_star(u, a)`, and `excess(u, a)`, positive outside
the domain of the conjugate. `a` is the threshold, (*b, 1) or a number, 0 for potentials without one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from schatten.maps.core import UNCONSTRAINED, Combinable
from schatten.maps.lifts import check_lift, magnitudes, replaced, safe_norm
from schatten.solvers import FunctionSolver, tower

Threshold = Tensor | float

# Where K* ends, an excess of this share of the magnitudes' sum is fp64 rounding of an SVD and counts as none.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Potential(Combinable, ABC):
    """A symmetric convex function of a matrix's magnitudes; `over` says of which (`schatten.maps.lifts`).

    `solver` computes the direction of a spectral potential and is not used by other lifts. A tower sees each magnitude
    alone: where h depends on all of them, `grad` must ask it for a function that does not.
    """

    over: str = field(default="spectrum", kw_only=True)
    solver: FunctionSolver = field(default_factory=tower, kw_only=True)

    @property
    def a(self) -> float:
        """The threshold, 0 for potentials without one."""
        return 0.0

    @property
    def relative(self) -> str | None:
        """The norm of the signal that the threshold follows, if any."""
        return None

    @property
    def degree(self) -> float:
        """h(c s, c a) = c^degree h(s, a) for every c > 0; solvers normalise by it."""
        return 0.0

    @property
    def rank(self) -> int | None:
        """How many of the largest magnitudes h is non-zero for and depends on; None for all."""
        return None

    def __post_init__(self) -> None:
        check_lift(self.over)
        self.check_solver()

    def check_solver(self) -> None:
        """Refuse a solver that cannot compute this map's direction."""
        if not isinstance(self.solver, FunctionSolver) or isinstance(self.solver, type):
            raise TypeError(
                f"solver must compute spectral functions, as schatten.solvers.tower() and svd() do; got {self.solver!r}."
            )
        if self.over == "spectrum":
            self.solver.check(self)

    @property
    def vanishes(self) -> bool:
        """Whether h is 0 below the threshold, so that errors are measured against the largest magnitude."""
        return False

    @property
    def family(self) -> Potential | None:
        """This function at a = 1, None without a threshold."""
        return None

    # -- functions of the magnitudes -----------------------------------------------------------------------------------

    @abstractmethod
    def k(self, s: Tensor, a: Threshold) -> Tensor: ...

    @abstractmethod
    def h(self, s: Tensor, a: Threshold) -> Tensor: ...

    @abstractmethod
    def k_star(self, u: Tensor, a: Threshold) -> Tensor: ...

    @abstractmethod
    def excess(self, u: Tensor, a: Threshold) -> Tensor: ...

    @abstractmethod
    def problem(self, decay: float) -> str:
        """What follows "min F" when the direction is grad K and the decoupled decay is `decay`."""

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        """argmin over x of k(x) + |x - s|^2 / (2 tau). Here for sums over the magnitudes: x + tau h(x) = s by bisection."""
        return bisected(lambda x: x + tau * self.h(x, a) < s, s)

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def threshold(self, S: Tensor) -> Threshold:
        """`a` for this matrix, (*b, 1) if it follows the matrix."""
        a = self.a
        if self.relative == "frobenius":
            return a * safe_norm(S, (-2, -1)).squeeze(-1)
        if self.relative == "spectral":
            return a * torch.linalg.matrix_norm(S, ord=2, keepdim=True).squeeze(-1)
        return a

    def value(self, S: Tensor) -> Tensor:
        """K(S) in fp64, (*b, m, n) -> (*b)."""
        S = S.double()
        return self.k(magnitudes(S, self.over), self.threshold(S))

    def grad(self, S: Tensor) -> Tensor:
        """grad K(S), the direction: by `solver` for a spectral potential, exact to rounding for the other lifts."""
        if self.over == "spectrum":
            return self.solver.apply(S, self)
        wide = S if S.dtype in (torch.float32, torch.float64) else S.float()
        return replaced(wide, self.over, lambda s: self.h(s, self.threshold(wide))).to(S.dtype)

    def conjugate(self, X: Tensor) -> Tensor:
        """K*(X) in fp64, infinity where `violation` is positive; (*b, m, n) -> (*b)."""
        a = self._fixed_threshold("conjugate")
        u = magnitudes(X.double(), self.over)
        outside = self._excess(u, a) > 0
        inside = torch.where(outside.unsqueeze(-1), 0, u)
        return torch.where(outside, torch.inf, self.k_star(inside, a))

    def violation(self, X: Tensor) -> Tensor:
        """How far `X` is outside the set where K* is finite, 0 inside, in units of its magnitudes; (*b, m, n) -> (*b)."""
        return self._excess(magnitudes(X.double(), self.over), self._fixed_threshold("violation"))

    def prox(self, S: Tensor, tau: float) -> Tensor:
        """argmin over X of K(X) + ||X - S||_F^2 / (2 tau), in fp64; (*b, m, n) -> (*b, m, n)."""
        a = self._fixed_threshold("prox")
        return replaced(S.double(), self.over, lambda s: self.shrunk(s, tau, a))

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """The problem that decoupled decay makes a rule on this map solve."""
        if weight_decay == 0:
            return UNCONSTRAINED
        moving = f"; the threshold moves with each signal's {self.relative} norm" if self.relative else ""
        return f"min F{self.problem(weight_decay / factor)}{moving}"

    def _excess(self, u: Tensor, a: float) -> Tensor:
        excess = self.excess(u, a)
        return torch.where(excess > ROUNDING * u.sum(-1), excess, 0.0)

    def _fixed_threshold(self, verb: str) -> float:
        if self.relative is not None:
            raise ValueError(
                f"{verb} needs a fixed threshold, but with relative={self.relative!r} a moves with every signal and the "
                f"direction is the gradient of no single K: build the map with relative=None."
            )
        return self.a


@dataclass(frozen=True)
class Thresholded(Potential):
    """A potential with a threshold a > 0 on the magnitudes.

    `relative=None` takes `a` as it is: K is one convex function, and the direction depends on the scale of the signal.
    `"frobenius"` and `"spectral"` take `a` times that norm of each signal: the direction then depends on the signal's
    shape alone, as Muon's does, but it is the gradient of no single K, so `conjugate`, `violation` and `prox` refuse.
    """

    a: float = 1.0  # type: ignore[assignment]
    relative: str | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if isinstance(self.a, bool) or not isinstance(self.a, (int, float)) or not 0 < self.a < math.inf:
            raise ValueError(f"{type(self).__name__} needs a threshold 0 < a < inf, got a={self.a!r}.")
        object.__setattr__(self, "a", float(self.a))
        if self.relative not in (None, "frobenius", "spectral"):
            raise ValueError(f"relative must be None, 'frobenius' or 'spectral', got {self.relative!r}.")
        super().__post_init__()

    @property
    def family(self) -> Potential:
        # Over the entries, so that its own construction asks no solver.
        return replace(self, a=1.0, relative=None, over="entries")


def bisected(too_small: Callable[[Tensor], Tensor], high: Tensor) -> Tensor:
    """The smallest x in [0, high] where the monotone condition no longer holds, to fp64 rounding."""
    low = torch.zeros_like(high)
    for _ in range(64):
        middle = (low + high) / 2
        small = too_small(middle)
        low, high = torch.where(small, middle, low), torch.where(small, high, middle)
    return high


def largest(u: Tensor) -> Tensor:
    """The largest magnitude, 0 if there is none."""
    return u.amax(-1) if u.shape[-1] else u.sum(-1)


def number(x: Any) -> str:
    """A number in a sentence, four digits and recognisably real: 2.0, 0.1333, 1e+06."""
    text = f"{float(x):.4g}"
    return text if "." in text or "e" in text or "n" in text else f"{text}.0"
