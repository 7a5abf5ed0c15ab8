"""Advice: what independent draws of slopes <G, D> and curvatures J(D) say of a matrix, each number with its interval.

A verdict is given only where an interval leaves out the contrary; ratios are compared without dividing where a curvature may
not be positive.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.diagnostics.constraint import decay_for_radius
from schatten.lab.jackknife import Interval, jackknife, log_jackknife
from schatten.scales import Scale

# The directions U S^p V^T that are compared: Muon's, two between, and the gradient itself.
POWERS = (0.0, 0.25, 0.5, 1.0)

YES, NO, CONDITION, UNDECIDED = "yes", "no", "by (4) only", "undecided"

# Places of the numbers of one draw: slopes <G, D> and curvatures J(D) for each of POWERS, L, and ||D||_F^2 of the last.
SLOPES, CURVATURES = range(len(POWERS)), range(len(POWERS), 2 * len(POWERS))
L, SQUARE = 2 * len(POWERS), 2 * len(POWERS) + 1


@dataclass(frozen=True)
class Advice:
    """What was found of one matrix, `shape` (fan_out, fan_in).

    Directions have the length the library's default scale gives them, root mean square 0.2, so steps are learning rates of
    `scale="adamw-rms"`: `slopes[p]` is <G, D_p> and `curvatures[p]` J(D_p) for D_p along U S^p V^T of the gradient.

    Attributes:
        factor: c(shape) of `adamw-rms`.
        norm: the spectral norm of the weight.
        smoothness: L, the largest |eigenvalue| of the Hessian in this matrix, mean over batches.
        safe: the gain of the best step along U V^T over what a gradient step can be sure of knowing L alone. Of exact gradients
            that is nuc^2/J over fro^2/L, and above 1 condition (4) of Shen et al. (arXiv 2505.23737); a batch's noise makes the
            step shorter. None where a curvature is not positive.
        best: the same over the gain of the best step along the gradient; at most `safe`.
        verdict: "yes" if U V^T clearly gains more than any gradient step, "by (4) only" if more than the sure one, but clearly
            less than the best one, "no" if clearly less than the sure one, otherwise "undecided".
        power: the p in `POWERS` that gains most; None where none is clearly better than another.
        contenders: those not clearly worse than it.
        lr: the best step along U V^T, this matrix alone; None where slope or curvature is not clearly positive.
        weight_decay: lambda whose ball, spectral norm at most c / lambda, has the wanted radius; inf for a weight of zeros.
    """

    name: str
    shape: tuple[int, int]
    factor: float
    norm: float
    slopes: Mapping[float, Interval]
    curvatures: Mapping[float, Interval]
    smoothness: Interval
    safe: Interval | None
    best: Interval | None
    verdict: str
    power: float | None
    contenders: tuple[float, ...]
    lr: Interval | None
    weight_decay: float


@dataclass(frozen=True)
class Trial:
    """A step of all matrices at once that was tried: the change of the loss on other batches, and what was predicted."""

    lr: float
    change: Interval
    predicted: float


@dataclass(frozen=True)
class Advised:
    """Advice for every matrix, in order, and for the model.

    Attributes:
        draws: independent pairs of batches behind every interval.
        joint: the best step along U V^T of all matrices at once, with their interactions: a learning rate of `adamw-rms`. None
            where slope or curvature is not clearly positive.
        alone: the median of the matrices' own best steps, which leave the others where they are.
        trials: steps around the joint one, tried.
        lr: where to start: the largest step up to the joint one whose trial lowered the loss most.
        weight_decay: the lambda that leaves every matrix the wanted radius or more.
        noise: trace of the gradients' covariance over the gradient's square, in batches: of fewer batches than this a gradient
            is mostly noise (McCandlish et al. 2018). None where the gradient is not distinguished from 0.
    """

    matrices: tuple[Advice, ...]
    draws: int
    joint: Interval | None
    alone: float | None
    trials: tuple[Trial, ...]
    lr: float | None
    weight_decay: float
    noise: float | None

    def __iter__(self) -> Iterator[Advice]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)


def advice_of(name: str, W: Tensor, x: Tensor, radius: float | None) -> Advice:
    """The advice that draws `x`, (draws, numbers), give for the matrix `name` with the weight W, (fan_out, fan_in)."""
    factor = Scale().factor(*W.shape)
    norm = float(torch.linalg.matrix_norm(W.cpu().double(), 2))
    wanted = norm if radius is None else radius
    slopes = {p: jackknife(x, lambda e, i=i: e[..., i]) for p, i in zip(POWERS, SLOPES, strict=True)}
    curvatures = {p: jackknife(x, lambda e, i=i: e[..., i]) for p, i in zip(POWERS, CURVATURES, strict=True)}
    power, contenders = _power(x)
    return Advice(
        name,
        (W.shape[0], W.shape[1]),
        factor,
        norm,
        slopes,
        curvatures,
        jackknife(x, lambda e: e[..., L]),
        log_jackknife(x, _safe),
        log_jackknife(x, lambda e: _gain(e, 0) / _gain(e, -1)),
        _verdict(x),
        power,
        contenders,
        best_step(x, SLOPES[0], CURVATURES[0]),
        decay_for_radius(wanted, factor) if wanted > 0 else math.inf,
    )


def _gain(e: Tensor, i: int) -> Tensor:
    """Twice the gain of the best step along the direction of POWERS[i]; nan where the model has none."""
    return _positive(e[..., SLOPES[i]]).square() / _positive(e[..., CURVATURES[i]])


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.nan)


def _guaranteed(e: Tensor) -> Tensor:
    """Twice what a step along the gradient gains for sure, knowing of its curvature only that it is at most L ||D||_F^2."""
    return _positive(e[..., SLOPES[-1]]).square() / (e[..., L] * e[..., SQUARE])


def _better(x: Tensor, i: int, j: int) -> int:
    """1 where the direction of POWERS[i] clearly gains more than that of POWERS[j], -1 where less."""
    a, b, s, t = CURVATURES[i], CURVATURES[j], SLOPES[i], SLOPES[j]
    return _clear(
        x,
        lambda e: _gain(e, i) / _gain(e, j),
        lambda e: e[..., b] * e[..., s].square() - e[..., a] * e[..., t].square(),
    )


def _clear(x: Tensor, ratio: Callable[[Tensor], Tensor], excess: Callable[[Tensor], Tensor]) -> int:
    """1 where a ratio of gains is clearly above 1, -1 where below, told by `excess` where curvatures are not all positive.

    For an equal fall of the loss to first order a direction loses J / slope^2 to curvature. `excess` compares that without
    dividing, so it has a sign where the best step and its gain are not finite.
    """
    found = log_jackknife(x, ratio)
    if found is None:
        return jackknife(x, excess).sign
    return 1 if found.low > 1 else -1 if found.high < 1 else 0


def _verdict(x: Tensor) -> str:
    if not all(jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in (SLOPES[0], SLOPES[-1])):
        return UNDECIDED
    best, safe = _better(x, 0, -1), _clear(x, _safe, _safe_excess)
    return YES if best > 0 else NO if safe < 0 else CONDITION if (best, safe) == (-1, 1) else UNDECIDED


def _safe(e: Tensor) -> Tensor:
    return _gain(e, 0) / _guaranteed(e)


def _safe_excess(e: Tensor) -> Tensor:
    bound = e[..., L] * e[..., SQUARE]
    return bound * e[..., SLOPES[0]].square() - e[..., CURVATURES[0]] * e[..., SLOPES[-1]].square()


def _power(x: Tensor) -> tuple[float | None, tuple[float, ...]]:
    """The power that gains most, and those not clearly worse; None where that is every one, or none clearly descends."""
    descends = [jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in SLOPES]
    mean = x.mean(0)
    if not any(descends):
        return None, POWERS
    lost = [float(mean[c] / mean[s].square()) for s, c in zip(SLOPES, CURVATURES, strict=True)]
    top = min((i for i, clear in enumerate(descends) if clear), key=lambda i: lost[i])
    kept = tuple(p for i, p in enumerate(POWERS) if descends[i] and (i == top or _better(x, i, top) >= 0))
    return (None if len(kept) == len(POWERS) else POWERS[top]), kept


def best_step(x: Tensor, slope: int, curvature: int) -> Interval | None:
    """The best step slope / curvature, where both are clearly positive."""
    if not all(jackknife(x, lambda e, i=i: e[..., i]).sign > 0 for i in (slope, curvature)):
        return None
    return log_jackknife(x, lambda e: e[..., slope] / e[..., curvature])
