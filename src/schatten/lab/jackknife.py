"""The jackknife: how uncertain a function of means is, by leaving one draw out at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from schatten.diagnostics.probes import widening

# With fewer draws than this Student's t is so wide that an interval says nothing.
FEWEST = 4


@dataclass(frozen=True)
class Interval:
    """A number, and the bounds it lies within 19 times in 20."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below 0, otherwise 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def jackknife(draws: Tensor, f: Callable[[Tensor], Tensor]) -> Interval:
    """The interval of f(expectation) from independent `draws`, (n, k).

    `f` maps means (..., k) to numbers (...). Its value is corrected for bias to first order, exactly for squares of means;
    the width is Student's t with n - 1 degrees of freedom times the jackknife's standard error (Efron and Stein, 1981).

    Raises ValueError for fewer than four draws.

    Example:
        >>> import torch
        >>> from schatten.lab.jackknife import jackknife
        >>> jackknife(torch.tensor([[1.0], [2.0], [2.0], [3.0]]), lambda mean: mean[..., 0]).value
        2.0
    """
    n = len(draws)
    if n < FEWEST:
        raise ValueError(f"An interval needs at least {FEWEST} independent draws, got {n}.")
    draws = draws.double()
    without = f((draws.sum(0) - draws) / (n - 1))
    value = float(n * f(draws.mean(0)) - (n - 1) * without.mean())
    error = float(((n - 1) * (without - without.mean()).square().mean()).sqrt())
    width = 2 * widening(n) * error
    return Interval(value, value - width, value + width)


def log_jackknife(draws: Tensor, f: Callable[[Tensor], Tensor]) -> Interval | None:
    """As `jackknife` of a positive number, in its logarithm, so that bounds are factors; None where it is not positive."""
    if not bool((f((draws.double().sum(0) - draws.double()) / (len(draws) - 1)) > 0).all()):
        return None
    found = jackknife(draws, lambda mean: f(mean).log())
    return Interval(*(math.exp(min(x, 700.0)) for x in (found.value, found.low, found.high)))
