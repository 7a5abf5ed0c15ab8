"""What the rows of trust_region say of the published orders, and who comes near the optimum."""

import math
from collections.abc import Sequence

import numpy as np

from schatten.lab.experiment import Verdict, verdict
from schatten.lab.experiments.trust_region.methods import METHODS
from schatten.lab.experiments.trust_region.rates import THEOREMS, Theorem
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, mean, p_value, spread, summary

# A gap that has closed to this share of the first counts as arrived. With noise and finitely many steps it cannot be zero;
# a method that solves another problem stays an order of magnitude above.
ARRIVED = 0.02

# Of an exponent: at finite T the residual is bounded by its start, which flattens the slope a little.
TOLERANCE = 0.02

SIGNIFICANT = 0.05

# Of a violation, as a share of the radius.
FEASIBLE = 0.02


def finals(rows: Sequence[Row], part: str, method: str) -> list[Row]:
    """The rows of a method on the problem `part` at its best lr, by seed."""
    wanted = (part, "final", method)
    found = [row for row in rows if (row.get("part"), row.get("phase"), row.get("method")) == wanted]
    return sorted(found, key=lambda row: row["seed"])


def shares(rows: Sequence[Row], part: str, method: str) -> list[float]:
    """The last gap as a share of the first."""
    return [row["gaps"][-1] / row["gaps"][0] for row in finals(rows, part, method)]


def exponents(rows: Sequence[Row], theorem: Theorem) -> list[float]:
    """The slope in log T of the theorem's quantity, one for each seed."""
    found = []
    own = [row for row in rows if row.get("part") == "rates" and row.get("theorem") == theorem.name]
    for seed in sorted({row["seed"] for row in own}):
        pairs = [(math.log(row["steps"]), row[theorem.quantity]) for row in own if row["seed"] == seed]
        pairs = [(x, math.log(y)) for x, y in pairs if y > 0]
        if len(pairs) >= 2:
            x, y = np.array(pairs).T
            found.append(float(np.polyfit(x, y, 1)[0]))
    return found


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Rates, then each problem."""
    verdicts = [_rate(rows, theorem) for theorem in THEOREMS]
    verdicts += [_solved(rows, kind) for kind in ("l2", "nuclear")]
    verdicts += [_another(rows), _ball(rows)]
    return [v for v in verdicts if v is not None]


def _rate(rows: Sequence[Row], theorem: Theorem) -> Verdict | None:
    found = exponents(rows, theorem)
    if not found:
        return None
    steps = sorted({row["steps"] for row in rows if row.get("theorem") == theorem.name})
    below = mean(found) < -theorem.bound - TOLERANCE
    why = (
        f"a bound from above, so a steeper slope agrees{' and this one holds with room' if below else ''}; tolerance "
        f"{TOLERANCE} for finite T, {steps[0]} to {steps[-1]} steps on noisy least squares; standard error "
        f"{spread(found) / math.sqrt(len(found)):.1g}"
    )
    holds = mean(found) <= -theorem.bound + TOLERANCE
    published = f"<= -{theorem.bound:.3g}, {theorem.order} (paper; the schedule derived)"
    return verdict(f"exponent of the {theorem.what}, {theorem.name} F", published, summary(found, 3), holds, why)


def _others(rows: Sequence[Row], kind: str, ours: Sequence[float]) -> str:
    names = [method.name for method in METHODS[kind][1:]]
    parts = [(name, shares(rows, kind, name)) for name in names]
    return "; ".join(f"{name} {summary(v, 2)}, {compared(ours, v)}" for name, v in parts if len(v) == len(ours))


def _edges(rows: Sequence[Row], kind: str) -> str:
    found = []
    for method in METHODS[kind]:
        tried = {
            row["lr"] for row in rows if (row.get("part"), row.get("method")) == (kind, method.name) and row["phase"] == "tune"
        }
        best = {row["lr"] for row in finals(rows, kind, method.name)}
        if len(tried) > 1 and best & {min(tried), max(tried)}:
            found.append(method.name)
    return f"; best lr on the edge of the grid for {', '.join(found)}" if found else ""


def _solved(rows: Sequence[Row], kind: str) -> Verdict | None:
    ours = shares(rows, kind, "composite Muon")
    if not ours:
        return None
    penalty = {"l2": "an l2 penalty", "nuclear": "a nuclear norm"}[kind]
    rank = f", rank {'/'.join(str(row['rank']) for row in finals(rows, kind, 'composite Muon'))}" if kind == "nuclear" else ""
    why = (
        f"share of the first gap that is left, on every seed at most {ARRIVED:.0%}. Others, p paired by seed: "
        f"{_others(rows, kind, ours)}{_edges(rows, kind)}"
    )
    quantity = f"composite Muon reaches the optimum of F with {penalty}"
    return verdict(quantity, "implied; no experiments in the paper", summary(ours, 2) + rank, max(ours) <= ARRIVED, why)


def _another(rows: Sequence[Row]) -> Verdict | None:
    ours, muon = (shares(rows, "l2", name) for name in ("composite Muon", "Muon, decoupled decay"))
    if not muon or len(ours) != len(muon):
        return None
    why = (
        f"the same number for both, decoupled decay bounds ||W||_op by 1/decay instead; {compared(ours, muon)}, paired by seed"
    )
    holds = mean(ours) < mean(muon) and p_value(ours, muon, paired=True) < SIGNIFICANT
    text = f"{summary(muon, 2)} left, against {summary(ours, 2)}"
    return verdict("decoupled decay solves another problem than an l2 penalty", "implied (inferred)", text, holds, why)


def _ball(rows: Sequence[Row]) -> Verdict | None:
    found = finals(rows, "ball", "Muon, decoupled decay")
    if not found:
        return None
    outside = [row["outside"][-1] for row in found]
    ours = [abs(share) for share in shares(rows, "ball", "Muon, decoupled decay")]
    holds = max(outside) <= FEASIBLE and max(ours) <= ARRIVED
    text = f"gap {summary(ours, 2)}, outside by {max(outside):.1g}"
    why = (
        f"share of the first gap, at most {ARRIVED:.0%}, and ||W||_op - radius at most {FEASIBLE:.0%} of it, at the last step "
        f"of every seed. Others: {_others(rows, 'ball', ours)}{_edges(rows, 'ball')}"
    )
    return verdict("Muon with decay 1/radius solves F over the spectral ball", "implied (inferred)", text, holds, why)
