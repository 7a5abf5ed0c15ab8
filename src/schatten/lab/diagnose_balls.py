"""The ball that matrices of a kind fit, and whether all hidden matrices press against a common bound c / lambda."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from schatten.diagnostics.constraint import decay_for_radius
from schatten.lab import matrix_kinds
from schatten.lab.diagnose_rows import NEAR, SCALES, Row

# Share of the further singular values that lie near the largest: more than random entries have (0.1 % of a large square
# matrix), and not all, as an orthogonal initial value has.
PILE = (0.05, 0.95)

# A random matrix of independent entries has its largest singular value within this of the edge rms (sqrt(m) + sqrt(n)).
EDGE = 0.05


@dataclass(frozen=True)
class Ball:
    """A kind's matrices: `radius` is their largest sigma_max, `weight_decay` the largest whose ball c / lambda holds all."""

    kind: str
    matrices: int
    radius: float
    median_sigma: float
    median_stable_rank: float
    weight_decay: Mapping[str, float]


@dataclass(frozen=True)
class Bound:
    """The common value of c / sigma_max, for the scale that has most hidden matrices near one.

    `near` of `matrices` are within 1 % of `weight_decay`, of `factors` different c; `random` of them have the sigma_max of
    random entries, which needs no bound to explain it. `pile` is the median share of their further singular values that are
    within 1 % of the largest, nan where they are not known.
    """

    scale: str
    weight_decay: float
    near: int
    matrices: int
    factors: int
    random: int
    pile: float
    lowest: float
    highest: float

    @property
    def supported(self) -> bool:
        common = self.near >= 3 and self.near >= self.matrices / 2 and self.random < self.near / 2
        return common and (self.factors > 1 or PILE[0] <= self.pile <= PILE[1])

    def sentence(self) -> str:
        """What the weights say about a bound, and no more than that."""
        share = f"{self.near} of {self.matrices} hidden matrices ({100 * self.near / self.matrices:.0f} %)"
        common = f"have a spectral norm within 1 % of c/λ for one λ = {self.weight_decay:.3g} with scale {self.scale!r}"
        pile = f"and {100 * self.pile:.0f} % of their other singular values are there, too" if self.pile >= PILE[0] else ""
        if self.supported and self.factors > 1:
            return (
                f"{share}, of {self.factors} different c, {common}{', ' * bool(pile)}{pile}: what training under a spectral "
                f"bound with that decay leaves behind. It is evidence, no proof: another decay with another scale may give "
                "the same radii."
            )
        if self.supported:
            return (
                f"{share} {common}, {pile}: what training under a spectral bound leaves behind. It is evidence, no proof, "
                "and as all have the same c, each scale fits with a decay of its own."
            )
        if self.near < 3 or self.near < self.matrices / 2:
            return (
                f"No common bound: c over spectral norm goes from {self.lowest:.3g} to {self.highest:.3g} in hidden matrices "
                f"(scale {self.scale!r}), and no more than {self.near} of {self.matrices} lie within 1 % of one value."
            )
        if self.random >= self.near / 2:
            return f"{share} {common}, but {self.random} of them have that of random entries: no bound is needed for it."
        return f"{share} {common}, but all have the same c: equal shapes trained alike give that without a bound, too."


def balls(rows: Sequence[Row]) -> list[Ball]:
    """The ball of each kind."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.sigma_max > 0:
            kinds.setdefault(row.kind, []).append(row)
    found = []
    for kind, own in kinds.items():
        decays = {scale: min(decay_for_radius(r.sigma_max, r.factor(scale)) for r in own) for scale in SCALES}
        sigmas = [r.sigma_max for r in own]
        found.append(Ball(kind, len(own), max(sigmas), median(sigmas), median(r.stable_rank for r in own), decays))
    order = {kind: i for i, kind in enumerate(matrix_kinds.HIDDEN)}
    return sorted(found, key=lambda ball: order.get(ball.kind, len(order)))


def bound(rows: Sequence[Row]) -> Bound | None:
    """The value of c / sigma_max that most hidden matrices are near, over all scales; None for fewer than three."""
    hidden = [row for row in rows if row.hidden and row.sigma_max > 0]
    if len(hidden) < 3:
        return None
    found = []
    for scale in SCALES:
        # c / sigma_max, c, whether random entries give as much, and the pile.
        values = [(r.factor(scale) / r.sigma_max, r.factor(scale), abs(r.peak - 1) < EDGE, r.pile) for r in hidden]
        values.sort(key=lambda value: value[0])
        lows = [value for value, *_ in values]
        ends = [bisect_right(lows, low * (1 + NEAR) / (1 - NEAR)) for low in lows]
        first = max(range(len(values)), key=lambda i: ends[i] - i)
        near = values[first : ends[first]]
        middle = near[len(near) // 2][0]
        factors = len({round(c, 9) for _, c, *_ in near})
        random = sum(is_random for *_, is_random, _ in near)
        known = [pile for *_, pile in near if not math.isnan(pile)]
        pile = median(known) if known else math.nan
        found.append(Bound(scale, middle, len(near), len(hidden), factors, random, pile, lows[0], lows[-1]))
    return max(found, key=lambda b: (b.supported, b.near))
