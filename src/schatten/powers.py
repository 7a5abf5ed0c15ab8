"""Spectral powers U S^p V^T for any p in [-0.9, 1]: what fills the map's slot, and the scales and rates that belong to p."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from schatten.directions import Direction, NoK, State
from schatten.functions import spectral_power
from schatten.maps import Map, Nuclear, Power
from schatten.scales import RMS, Factor, Scale
from schatten.solvers import FunctionSolver, polynomial, tower
from schatten.solvers.power_function import PowerFunction


@dataclass(frozen=True)
class NegativePower(NoK):
    """D = U S^p V^T for -0.9 <= p < 0, which enlarges what is small: by `schatten.spectral_power`, to 2 %, or `solver`.

    Singular values below 1e-3 of the largest tend to 0 instead of infinity.

    Raises ValueError for another p; 0 < p <= 1 is the map `schatten.maps.Power`, p = 0 `Nuclear`.

    Example:
        >>> import torch, schatten
        >>> half = schatten.powers.NegativePower(-0.5)
        >>> D, _ = half(torch.diag(torch.tensor([4.0, 1.0])), {}, {})
        >>> bool(((D.diagonal() - torch.tensor([0.5, 1.0])).abs() < 0.03).all())
        True
    """

    p: float
    solver: FunctionSolver | None = None

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not -0.9 <= self.p < 0:
            raise ValueError(f"NegativePower needs -0.9 <= p < 0, got p={self.p!r}; above it are Nuclear() and Power(p).")
        object.__setattr__(self, "p", float(self.p))

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.solver is None:
            return spectral_power(S, self.p), {}
        return self.solver.apply(S, PowerFunction(self.p)), {}


def spectral_direction(p: float, solver: Any = None) -> Map | Direction:
    """What computes U S^p V^T: `Nuclear`, `Power(p)`, the signal itself for p = 1, `NegativePower` below 0.

    `solver` is a `Solver` for p = 0 and a `FunctionSolver` for the other powers, p = 1 needs none.
    """
    check_power(p)
    if p == 0:
        return Nuclear(polynomial() if solver is None else solver)
    if solver is not None and (isinstance(solver, type) or not isinstance(solver, FunctionSolver)):
        raise TypeError(f"solver must compute U S^{p:g} V^T, as schatten.solvers.tower() and svd() do; got {solver!r}.")
    if p == 1:
        return Power(1.0, over="entries")
    if p > 0:
        return Power(p, solver=tower() if solver is None else solver)
    return NegativePower(p, solver)


def check_power(p: object) -> None:
    """Raise ValueError for what is no exponent in [-0.9, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not -0.9 <= p <= 1:
        raise ValueError(f"p must be a number in [-0.9, 1], got {p!r}.")


def power_scale(p: float, normalize: str | None) -> Factor:
    """The released factor of a power, sqrt(max(1, fan_out / fan_in)) for p = 0 alone, or AdamW's RMS for all with "rms"."""
    if normalize not in (None, "rms"):
        raise ValueError(f'normalize must be None (the released factors) or "rms" (one lr for all p), got {normalize!r}.')
    return RMS() if normalize else Scale("keller" if p == 0 else "none")


def power_lr(p: float, normalize: str | None, published: Sequence[tuple[float, float]]) -> float:
    """The lr of an exponent: geometric interpolation of the published (p, lr), the first below them; 1e-3 with "rms"."""
    check_power(p)
    if normalize:
        return 1e-3
    if p <= published[0][0]:
        return published[0][1]
    (low, a), (high, b) = next(pair for pair in pairwise(published) if p <= pair[1][0])
    return a * (b / a) ** ((p - low) / (high - low))
