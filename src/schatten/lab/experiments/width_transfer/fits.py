"""Best learning rates and slopes against width, seed by seed, from rows."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from schatten.lab.ledger import Row
from schatten.lab.statistics import mean

# exponent of lr -> loss
Losses = Mapping[float, float]


def vertex(losses: Losses) -> float:
    """The exponent at the minimum of the parabola through the lowest loss and its two neighbours.

    The lowest itself where it lies at an end or beside a run that diverged.
    """
    ks = sorted(losses)
    i = min(range(len(ks)), key=lambda i: losses[ks[i]])
    if i in (0, len(ks) - 1) or not all(math.isfinite(losses[k]) for k in ks[i - 1 : i + 2]):
        return ks[i]
    a, b, _ = np.polyfit(ks[i - 1 : i + 2], [losses[k] for k in ks[i - 1 : i + 2]], 2)
    return float(-b / (2 * a)) if a > 0 else ks[i]


def at_end(losses: Losses) -> bool:
    """Whether the lowest loss lies at an end of what was tried."""
    return min(losses, key=lambda k: losses[k]) in (min(losses), max(losses))


def sweeps(rows: Sequence[Row], contender: str) -> dict[int, dict[int, Losses]]:
    """width -> seed -> losses, of the seeds that every width has."""
    found: dict[int, dict[int, dict[float, float]]] = {}
    for r in rows:
        if r.get("phase") == "sweep" and r.get("contender") == contender:
            found.setdefault(r["width"], {}).setdefault(r["seed"], {})[math.log2(r["lr"])] = r["loss"]
    seeds = set.intersection(*(set(of) for of in found.values())) if found else set()
    return {w: {s: found[w][s] for s in sorted(seeds)} for w in sorted(found)} if seeds else {}


def vertices(rows: Sequence[Row], contender: str) -> dict[int, list[float]]:
    """width -> the best exponent of each seed."""
    return {w: [vertex(losses) for losses in of.values()] for w, of in sweeps(rows, contender).items()}


def slopes(by_width: Mapping[int, Sequence[float]]) -> list[float]:
    """Of each seed, the least-squares slope of values against log2 width; nothing of fewer than two widths."""
    if len(by_width) < 2:
        return []
    x = np.log2(sorted(by_width))
    return [float(np.polyfit(x, values, 1)[0]) for values in np.array([by_width[w] for w in sorted(by_width)]).T]


def best_losses(of: Mapping[int, Losses]) -> list[float]:
    """The loss of each seed at the lr with the lowest mean loss of the other seeds, so that no seed chooses for itself.

    Only lr that every seed tried count; nothing where there is none.
    """
    shared = sorted(set.intersection(*(set(losses) for losses in of.values())))
    chosen = []
    for seed, losses in of.items() if shared else ():
        others = [other for s, other in of.items() if s != seed] or [losses]
        k = min(shared, key=lambda k: mean([other[k] for other in others]))
        chosen.append(losses[k])
    return chosen


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % t-interval; infinite of fewer than two values."""
    center = mean(values)
    if len(values) < 2:
        return center, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return center, center - half, center + half


def by_width(rows: Sequence[Row], phase: str, contender: str, value: Callable[[Row], float | None]) -> dict[int, list[float]]:
    """width -> `value` of the rows of seeds that have one at every width."""
    found: dict[int, dict[int, float]] = {}
    for r in rows:
        if r.get("phase") == phase and r.get("contender") == contender:
            v = value(r)
            if v is not None:
                found.setdefault(r["width"], {})[r["seed"]] = v
    seeds = sorted(set.intersection(*(set(of) for of in found.values()))) if found else []
    return {w: [of[s] for s in seeds] for w, of in sorted(found.items())} if seeds else {}
