"""Two forms of steps against batch size and their fits; curves of steps from rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from schatten.lab.ledger import Row

# Points of the search for a fit's second constant: neighbours differ by 1 % or less.
POINTS = 2000

Form = Literal["bound", "hyperbola"]


@dataclass(frozen=True)
class Curve:
    """`steps` (seeds, batches) of one optimizer at the batch sizes `batches`, inf where not reached within `limits` steps."""

    batches: np.ndarray
    steps: np.ndarray
    limits: np.ndarray

    @property
    def arrived(self) -> "Curve":
        """Without the batches at which a seed did not arrive."""
        kept = np.isfinite(self.steps).all(0)
        return Curve(self.batches[kept], self.steps[:, kept], self.limits[:, kept])

    @property
    def gradients(self) -> np.ndarray:
        """N = b T, of runs that did not arrive what they had spent: a lower bound."""
        return np.where(np.isfinite(self.steps), self.steps, self.limits) * self.batches


@dataclass(frozen=True)
class Fitted:
    """T(b) = level / (1 - b0 / b), the bound's form, or level (1 + b0 / b), the hyperbola; `rms` of log T's residual."""

    form: Form
    level: float
    b0: float
    rms: float

    def __call__(self, batches: np.ndarray) -> np.ndarray:
        return self.level * np.exp(_shape(self.form, np.asarray(batches, float), np.array([self.b0])))[0]


def curve(rows: Sequence[Row], phase: str, optimizer: str) -> Curve | None:
    """Of the rows of a phase; None where there are fewer than three batches. Seeds that lack a batch are left out."""
    chosen = [r for r in rows if r.get("phase") == phase and r.get("optimizer") == optimizer]
    found = {(r["seed"], r["batch"]): (float(r["steps"]), float(r["limit"])) for r in chosen}
    batches = sorted({b for _, b in found})
    seeds = [s for s in sorted({s for s, _ in found}) if all((s, b) in found for b in batches)]
    if len(batches) < 3 or not seeds:
        return None
    steps, limits = np.array([[found[s, b] for b in batches] for s in seeds]).transpose(2, 0, 1)
    return Curve(np.array(batches, float), steps, limits)


def fitted(form: Form, batches: np.ndarray, steps: np.ndarray) -> Fitted:
    """Least squares of log T over the two constants: the level in closed form, b0 by search.

    b0 of the bound lies in [0, the smallest batch), where T is positive; that of the hyperbola within 1/1000 of the
    smallest and 1000 times the largest batch.
    """
    if form == "bound":
        candidates = batches.min() * np.concatenate([np.linspace(0, 0.99, POINTS // 2), 1 - np.geomspace(1e-2, 1e-9, POINTS)])
    else:
        candidates = np.geomspace(batches.min() / 1000, batches.max() * 1000, POINTS)
    residual = np.log(steps) - _shape(form, batches, candidates)
    levels = residual.mean(1)
    errors = np.square(residual - levels[:, None]).mean(1)
    best = int(errors.argmin())
    return Fitted(form, math.exp(levels[best]), float(candidates[best]), math.sqrt(errors[best]))


def mean_fit(form: Form, of: Curve) -> Fitted:
    """Of the geometric means over seeds."""
    return fitted(form, of.batches, np.exp(np.log(of.steps).mean(0)))


def logs_of_b0(form: Form, of: Curve) -> list[float]:
    """log b0 of each seed's own curve."""
    return [math.log(max(fitted(form, of.batches, steps).b0, 1e-12)) for steps in of.steps]


def lack_of_fit(form: Form, of: Curve) -> float:
    """p of the F-test of the fit's residuals against the spread of seeds (in log T); nan of fewer than two seeds."""
    logs = np.log(of.steps)
    seeds, count = logs.shape
    if seeds < 2 or count < 3:
        return math.nan
    lack = seeds * np.square(logs.mean(0) - np.log(mean_fit(form, of)(of.batches))).sum() / (count - 2)
    pure = np.square(logs - logs.mean(0)).sum() / (count * (seeds - 1))
    return float(stats.f.sf(lack / pure, count - 2, count * (seeds - 1))) if pure > 0 else math.nan


def _shape(form: Form, batches: np.ndarray, b0: np.ndarray) -> np.ndarray:
    """log T up to the level, (candidates, batches)."""
    ratio = b0[:, None] / batches
    return -np.log1p(-ratio) if form == "bound" else np.log1p(ratio)
