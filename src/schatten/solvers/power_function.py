"""h = s^p for any real p, as solvers take it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PowerFunction:
    """A spectral function without threshold or rank; `degree` is p."""

    degree: float
    a = 0.0
    rank = relative = family = None
    vanishes = False

    def h(self, s: Tensor, a: Tensor | float) -> Tensor:
        return s.pow(self.degree)

    def threshold(self, S: Tensor) -> float:
        return 0.0
