"""Probes: random signs, and what the spread of a few samples says about their mean.

A mean of few samples lies in Student's distribution, which has wide tails. Errors here are widened by its quantile, so that
value +- 2 error holds the true number as often as 2 standard errors of a normal mean do, 95.4 %, from two samples on.
"""

import math
from functools import cache

import torch
from torch import Tensor

from schatten.diagnostics.core import Estimate


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs -1 and 1 in the shape and on the device of `like`, drawn on the CPU, the same on every device.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.probes import rademacher
        >>> rademacher(torch.zeros(2, 3), torch.Generator().manual_seed(0)).abs().sum()
        tensor(6.)
    """
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)


def mean_of(samples: Tensor) -> Estimate:
    """The mean of independent samples (k, *s) -> (*s), its standard error widened for small k.

    Raises ValueError for fewer than two samples, which say nothing of their spread.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.probes import mean_of
        >>> value, error = mean_of(torch.tensor([1.0, 3.0]))
        >>> float(value), round(float(error), 1)
        (2.0, 7.0)
    """
    return Estimate(samples.mean(0), samples.std(0) / math.sqrt(len(samples)) * widening(len(samples)))


def ratio_of(over: Tensor, under: Tensor) -> Estimate:
    """The mean of `over` divided by the mean of `under`, samples (k, *s) that belong together, by the jackknife.

    A ratio of means is biased by O(1/k); the mean of the jackknife's pseudo-values, k R - (k-1) R_without_i, by O(1/k^2), and
    their spread is its standard error (Quenouille 1956, Tukey 1958). Raises ValueError for fewer than two samples.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.probes import ratio_of
        >>> ratio_of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
        Estimate(value=tensor(0.5000), error=tensor(0.))
    """
    k = len(over)
    without = (over.sum(0) - over) / (under.sum(0) - under)
    return mean_of(k * over.sum(0) / under.sum(0) - (k - 1) * without)


@cache
def widening(samples: int) -> float:
    """t / 2, where Student's distribution with samples - 1 degrees of freedom holds erf(sqrt 2) = 95.4 % within +- t.

    7.0 for two samples, 1.65 for four, 1.21 for eight, tending to 1. By bisection of the finite sums for integer degrees of
    freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    if samples < 2:
        raise ValueError(f"An error bar needs at least 2 independent samples (probes), got {samples}.")
    low, high = 2.0, 16.0
    while high - low > 1e-12:
        t = (low + high) / 2
        low, high = (t, high) if _held(t, samples - 1) < math.erf(math.sqrt(2)) else (low, t)
    return low / 2


def _held(t: float, freedom: int) -> float:
    """The probability that Student's t with integer degrees of freedom lies within +- t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for j in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * j / (j + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
