"""Constraint: where a weight is against the ball that its rule's decay draws, and when it will be inside.

Directions D of a map with bounded D, ||D||_op <= 1 for Muon's, and decoupled decay lambda pull a weight into the ball
||W||_op <= c / lambda whatever the gradients are: the excess over it shrinks by 1 - lr lambda at each step (explicit decay) or
by 1 / (1 + lr lambda) (implicit) at least, so that how long it takes is a statement about the sum of lr lambda.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.fenchel_young import Implied, implied, unscaled
from schatten.maps import Frobenius, Map, Nuclear, Sum
from schatten.metrics import spectral_norm
from schatten.retractions.core import decay_of

__all__ = [
    "QUANTITY",
    "Constraint",
    "ball_violation",
    "constraint_ratio",
    "decay_for_radius",
    "direction_bound",
    "radius_of_decay",
    "steps_to_enter",
]


def constraint_ratio(weight: Tensor, weight_decay: float, factor: float = 1.0) -> Tensor:
    """||W||_op lambda / c, (*b, m, n) -> (*b) in fp64: at most 1 in the ball of radius c / lambda; 0 without decay.

    `factor` is c, times the map's `direction_bound` where that is not 1. Cost: one SVD in fp64.

    Raises ValueError for weight_decay < 0 and factor <= 0.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.constraint import constraint_ratio
        >>> float(constraint_ratio(torch.diag(torch.tensor([3.0, 1.0])), weight_decay=0.5))
        1.5
    """
    _check(weight_decay, factor)
    return _norm(weight) * (weight_decay / factor)


def ball_violation(weight: Tensor, weight_decay: float, factor: float = 1.0) -> Tensor:
    """V_B = max(||W||_op - c / lambda, 0) (arXiv 2506.15054, eq. 7), (*b, m, n) -> (*b) in fp64; 0 without decay.

    By explicit decay V_B shrinks by 1 - lr lambda at each step or faster, by implicit decay by 1 / (1 + lr lambda), for any
    gradients and exact directions. (The paper states the first rate for the second decay.) Arguments, cost and errors as of
    `constraint_ratio`; in units of W's singular values.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.constraint import ball_violation
        >>> float(ball_violation(torch.diag(torch.tensor([3.0, 1.0])), weight_decay=0.5))
        1.0
    """
    return (_norm(weight) - radius_of_decay(weight_decay, factor)).clamp(min=0)


def radius_of_decay(weight_decay: float, factor: float = 1.0) -> float:
    """c / lambda: the spectral norm that decay lambda holds weights to; infinite without decay.

    A matrix all of whose singular values are there has entries of RMS c / (lambda sqrt(max(fan_out, fan_in))): with the scale
    "adamw-rms" that is 0.2 / lambda for every shape.

    Raises ValueError for weight_decay < 0 and factor <= 0.

    Example:
        >>> from schatten.diagnostics.constraint import radius_of_decay
        >>> radius_of_decay(0.1, factor=2.0)
        20.0
    """
    _check(weight_decay, factor)
    return factor / weight_decay if weight_decay else math.inf


def decay_for_radius(radius: float, factor: float = 1.0) -> float:
    """c / radius: the decay lambda that holds weights to a wanted spectral norm; `factor` is c, see `schatten.scales`.

    Raises ValueError for radius or factor that are not positive.

    Example:
        >>> import schatten
        >>> from schatten.diagnostics.constraint import decay_for_radius
        >>> decay_for_radius(10.0, factor=schatten.scales.Scale("keller").factor(12, 3))
        0.2
    """
    if not radius > 0 or not factor > 0:
        raise ValueError(f"radius and factor must be positive, got radius={radius} and factor={factor}.")
    return factor / radius


def steps_to_enter(
    norm: float,
    lr: float | Sequence[float] | Callable[[int], float],
    weight_decay: float,
    factor: float = 1.0,
    *,
    margin: float = 0.01,
    decay: Literal["explicit", "implicit"] = "explicit",
    limit: int = 10_000_000,
) -> int | None:
    """After how many steps ||W||_op <= (1 + margin) c / lambda at the latest, from ||W||_op = norm; None if never.

    The first t for which (norm - c / lambda) times the product of 1 - lr_s lambda over s < t (explicit decay), or of
    1 / (1 + lr_s lambda) (implicit), is at most margin c / lambda: close to log(excess / (margin c / lambda)) over lambda times
    the mean lr. It holds for any gradients and exact directions; gradients that pull inward get there sooner.

    Args:
        norm: the weight's spectral norm now.
        lr: a number, the lr of each coming step (None is returned if the sequence ends too early), or a function of the
            step, 0 for the next one.
        weight_decay: lambda; 0 draws no ball, so the answer is 0.
        factor: c, times the map's `direction_bound` where that is not 1.
        margin: share of the radius that may be left; the ball itself is only reached in the limit.
        decay: form of `schatten.retractions.DecoupledDecay`.
        limit: steps after which a function of the step counts as never getting there.

    Raises ValueError for numbers out of range, among them lr lambda > 1 with explicit decay, for which no rate holds.

    Example:
        >>> from schatten.diagnostics.constraint import steps_to_enter
        >>> steps_to_enter(5.0, 0.02, 0.5, margin=0.01), steps_to_enter(5.0, lambda t: 0.02 * 0.999**t, 0.5, margin=0.01)
        (499, 692)
    """
    _check(weight_decay, factor)
    if not margin > 0 or not norm >= 0:
        raise ValueError(f"margin must be positive and norm not negative, got margin={margin} and norm={norm}.")
    radius = radius_of_decay(weight_decay, factor)
    left = norm - radius
    if left <= margin * radius:
        return 0
    # Sums of logarithms, which do not underflow as products do; where they meet the bound up to rounding, they meet it.
    wanted = math.log(left / (margin * radius)) * (1 - 1e-12)
    if isinstance(lr, (int, float)):
        rate = _rate(lr * weight_decay, decay)
        return max(1, math.ceil(wanted / rate)) if rate else None
    passed = 0.0
    for t, value in enumerate(map(lr, range(limit)) if callable(lr) else lr):
        passed += _rate(value * weight_decay, decay)
        if passed >= wanted:
            return t + 1
    return None


def direction_bound(map: Map) -> float | None:
    """The largest spectral norm of a direction grad K(S), so that decay lambda draws weights to ||W||_op <= bound c / lambda.

    1 for Muon's map and most potentials of the spectrum, a for `Clip(a)`, infinite where directions grow with the signal, None
    for maps that are no functions of singular values alone (entries, rows, columns) or have no fixed threshold. Where K*'s
    domain is smaller than the ball (`KyFan`, `Schatten`, `Frobenius`), this is the smallest ball around it.

    Example:
        >>> import schatten
        >>> from schatten.diagnostics.constraint import direction_bound
        >>> [direction_bound(K) for K in (schatten.maps.Nuclear(), 0.5 * schatten.maps.Clip(2.0), schatten.maps.L1())]
        [1.0, 1.0, None]
    """
    map, c = unscaled(map)
    if isinstance(map, Sum):
        bounds = [direction_bound(part) for part in map.maps]
        return None if None in bounds else c * sum(bound for bound in bounds if bound is not None)
    if isinstance(map, (Nuclear, Frobenius)):
        return c
    if getattr(map, "over", None) not in ("spectrum", "matrix") or getattr(map, "relative", None) is not None:
        return None
    # Directions fill the domain of K*, whose largest spectral norm a matrix of rank one has: here one of 1 x 1.
    x = torch.ones(1, 1, dtype=torch.float64)
    while map.violation(x) == 0 and x < FAR:
        x = 2 * x
    outside = float(map.violation(x))
    gauge = float(map.violation(2 * x)) - outside
    return c * float(x) * (gauge - outside) / gauge if outside else math.inf


@dataclass(frozen=True)
class Constraint:
    """Logs where each matrix is against the ball of its rule's decay: `constraint_ratio`, `ball_violation`, steps to enter.

    For rules on a `Map` with `DecoupledDecay` and lambda > 0; others draw no ball and log nothing. Maps on entries, rows or
    columns log how far they are outside their own set. Spectral norms are found by power iteration
    (`schatten.metrics.spectral_norm`), which is from below and within a few per cent: the exact ones are the functions'.

    Args:
        overshoot: how far beyond the radius, as a share of it, directions that are not exact may carry a weight before
            `alarm` calls: 0.2 is the overshoot of Keller Jordan's quintics, beyond that of the default solvers; 0.01 is right
            for `svd()`.
        margin: the share of the radius at which `steps` counts as inside.
    """

    overshoot: float = 0.2
    margin: float = 0.01

    name: ClassVar[str] = "constraint"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset()
    columns: ClassVar[Mapping[str, str]] = {
        "ratio": "||W||_op lambda / c, from below by power iteration: at most 1 inside the ball; without unit",
        "excess": "V_B = max(||W||_op - c / lambda, 0), from below; in units of W",
        "radius": "c / lambda, the spectral norm that decay holds W to; in units of W",
        "steps": "steps at this lr and lambda after which ||W||_op is within `margin`, 1 %, of the radius at the latest",
        "violation": "maps on entries, rows or columns: how far lambda W / c is outside their set; without unit, 0 inside",
    }
    cost: ClassVar[str] = "16 power iterations: two products with a vector each"

    def __call__(self, block: Block) -> Mapping[str, Tensor]:
        problem = implied(block)
        if problem is None or not problem.weight_decay:
            return {}
        if (bound := direction_bound(problem.map)) is None:
            # The violation of a sum is found by iteration, which waits for the device.
            return {} if isinstance(problem.map, Sum) else {"violation": _violation(block.weight, problem)}
        if bound == math.inf:
            return {}
        radius = bound * problem.factor / problem.weight_decay
        norm = spectral_norm(block.weight)
        excess = (norm - radius).clamp(min=0)
        d = decay_of(block.group)
        left = 1 - d if problem.form == "explicit" else 1 / (1 + d)
        rate = -torch.log(left.to(norm).abs() if isinstance(left, Tensor) else torch.full_like(norm, abs(left)))
        allowed = self.margin * radius
        # Without a rate, as at lr 0, the weight stays where it is.
        steps = torch.where(rate == 0, torch.inf, (torch.log(excess / allowed) / rate).ceil().clamp(min=1))
        return {
            "ratio": norm / radius,
            "excess": excess,
            "radius": torch.full_like(norm, radius),
            "steps": torch.where(excess <= allowed, 0, steps),
        }

    def alarm(self, previous: Mapping[str, float], now: Mapping[str, float]) -> str | None:
        """What to say if V_B grew between two records of one matrix by more than rounding and overshoot explain, else None.

        Not while the radius itself changes, as with a schedule of lambda.
        """
        if "violation" in previous and "violation" in now:
            before, after = 1 + previous["violation"], 1 + now["violation"]
            what = "lambda W / c is outside the set of its map's K*"
        elif "ratio" in previous and "ratio" in now:
            if abs(now["radius"] - previous["radius"]) > STEADY * previous["radius"]:
                return None
            before, after = previous["ratio"], now["ratio"]
            what = f"||W||_op is beyond c / lambda = {now['radius']:.4g}"
        else:
            return None
        if not (after > 1 + self.overshoot and after - before > STEADY * after):
            return None
        return (
            f"{what}, and its excess V_B grew from {before - 1:.4g} to {after - 1:.4g} of the radius, though decay only lets "
            f"it shrink whatever the gradients are. Likely causes: updates longer than lr c (another shape factor than the "
            f"rule's, or a Newton-Schulz overshoot of more than {self.overshoot:.0%}); decay that is not lr * weight_decay "
            f"(coupled to the gradient, skipped, with another lr, or lr * weight_decay > 1); weights changed outside the "
            f"optimizer."
        )


QUANTITY = Constraint

# Directions of a spectral norm that is larger still count as unbounded.
FAR = 1e12

# A relative change below this is no growth: power iteration and half-precision weights drift by as much.
STEADY = 1e-3


def _violation(weight: Tensor, problem: Implied) -> Tensor:
    return problem.map.violation(weight.double() * (problem.weight_decay / problem.factor))


def _rate(decay: float, form: str) -> float:
    """The logarithm of what is left of an excess after a step, with the other sign."""
    if form not in ("explicit", "implicit"):
        raise ValueError(f"decay must be 'explicit' or 'implicit', got {form!r}.")
    if not decay >= 0 or (form == "explicit" and decay > 1):
        raise ValueError(
            f"lr * weight_decay must be at least 0, and at most 1 with explicit decay, for V_B to shrink; got {decay:g}."
        )
    if form == "implicit":
        return math.log1p(decay)
    return -math.log1p(-decay) if decay < 1 else math.inf


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double()).amax(-1)


def _check(weight_decay: float, factor: float) -> None:
    if not weight_decay >= 0 or not factor > 0:
        raise ValueError(f"weight_decay must be at least 0 and factor positive, got {weight_decay} and {factor}.")
