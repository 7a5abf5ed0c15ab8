"""Statistics of few seeds: mean and spread as text, and the p-value without which nothing is called better."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds; nan of fewer than two or of values that are not finite."""
    if len(values) < 2 or not all(math.isfinite(v) for v in values):
        return math.nan
    return statistics.stdev(values)


def summary(values: Sequence[float], digits: int = 4, lost: str = "diverged") -> str:
    """`1.234 +- 0.056 (n = 3)`: `digits` significant digits of the mean of the finite ones, two of their spread.

    Infinite values are counted, and called `lost`.
    """
    finite = [v for v in values if math.isfinite(v)]
    missing = len(values) - len(finite)
    if not finite:
        return f"inf (n = {len(values)}, all {lost})"
    deviation = spread(finite)
    center = f"{mean(finite):.{digits}g}"
    text = center if math.isnan(deviation) else f"{center} +- {deviation:.2g}"
    return f"{text} (n = {len(values)}{f', {missing} {lost}' if missing else ''})"


def p_value(ours: Sequence[float], others: Sequence[float], *, paired: bool = False) -> float:
    """Two-sided p of equal means: Welch's t-test, or with `paired` the t-test of the differences (equal seeds in one order).

    nan where a value is not finite or there are fewer than two of a kind: then nothing is claimed. Values that do not vary
    at all differ surely or not at all: 0 or 1.
    """
    if min(len(ours), len(others)) < 2 or not all(math.isfinite(v) for v in (*ours, *others)):
        return math.nan
    # Written out: scipy's tests warn of values that are equal but for rounding, where these two are as good as exact.
    if paired:
        differences = [a - b for a, b in zip(ours, others, strict=True)]
        gap, error, freedom = mean(differences), spread(differences) / math.sqrt(len(ours)), len(ours) - 1.0
    else:
        first, second = spread(ours) ** 2 / len(ours), spread(others) ** 2 / len(others)
        gap, error = mean(ours) - mean(others), math.sqrt(first + second)
        freedom = error**4 / (first**2 / (len(ours) - 1) + second**2 / (len(others) - 1)) if error else math.inf
    if error == 0:
        return 1.0 if gap == 0 else 0.0
    return float(2 * stats.t.sf(abs(gap) / error, freedom))


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line through points and its standard error."""
    found: Any = stats.linregress(x, y)
    return float(found.slope), float(found.stderr)


def compared(ours: Sequence[float], others: Sequence[float], *, paired: bool = True) -> str:
    """`n = 3, p = 0.012`, as a claim must carry it."""
    p = p_value(ours, others, paired=paired)
    return f"n = {min(len(ours), len(others))}, {'no p-value' if math.isnan(p) else f'p = {p:.2g}'}"
