"""What the rows say beside the table of K."""

import math
from collections.abc import Sequence
from statistics import median

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.convex_maps.table import MUON
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean, p_value, summary

# Beyond what the rate of the decay leaves of a start outside: fp32 weights, and directions of the default solvers, which are
# off by up to 0.16 of the radius.
BALL = {True: 1e-3, False: 0.16}

# A residual is 0 in the limit; in a finite training it counts as fallen at a fifth of its scale, 1.
FALLEN = 0.2

# Updates are matched on one seed and by two trainings.
MATCHED = 0.15

SIGNIFICANT = 0.05


def finals(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of the comparison by map, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["phase"] == "final":
            found.setdefault(row["map"], []).append(row)
    return found


def check(rows: Sequence[Row]) -> list[Verdict]:
    """One verdict for each row of the table, one on the losses."""
    found = finals(rows)
    if not found:
        return []
    return [*(_induced(name, own) for name, own in found.items()), _losses(found)]


def _induced(name: str, own: Sequence[Row]) -> Verdict:
    first, last = ([row["residual"][i] for row in own if len(row["residual"]) == 2] for i in (0, 1))
    balls = [row["ball"][-1] for row in own]
    tolerance = BALL[own[0]["exact"]]
    held = all(row["ball"][-1] <= row["allowed"] + tolerance for row in own)
    fallen = len(last) == len(own) and max(last) <= FALLEN
    bounded = max(balls) > 0
    others = [value for row in own for key, value in row["others"].items() if key != name]
    lower = max((sum(v < row["others"][name] for v in row["others"].values()) for row in own if row["others"]), default=0)
    ball = (
        f"dual-ball value {summary([row['ball'][0] for row in own], 3)} to {summary(balls, 4)}"
        if bounded
        else "K* finite everywhere"
    )
    found = f"residual {summary(first, 3)} to {summary(last, 3)}, score to {_share(own)} of the start's" if last else "diverged"
    excess = max(row["allowed"] for row in own) - 1
    left = f" and {excess:.1g} that the decay leaves of the start" if excess else ""
    return verdict(
        f"{name}: induced problem",
        f"{own[0]['problem'].removeprefix('min ')} (table of K, derived)",
        f"{ball}; {found}",
        held and fallen,
        (f"dual-ball value at most 1{left}, tolerance {tolerance:g}; " if bounded else "")
        + f"residual at most {FALLEN:g} of its terms on every seed after {own[0]['steps']} steps, 0 in the limit; in the other "
        f"maps' problems the median is {_median(others)}, and at most {lower} of {len(own[0]['others'])} problems "
        f"fit better",
    )


def _share(own: Sequence[Row]) -> str:
    return summary([row["score"][1] / row["score"][0] for row in own if len(row["score"]) == 2], 2)


def _median(values: Sequence[float]) -> str:
    return f"{median(values):.2g}" if values else "not known"


def _losses(found: dict[str, list[Row]]) -> Verdict:
    losses = {name: [row["loss"] for row in own] for name, own in found.items()}
    ranked = sorted(losses, key=lambda name: mean(losses[name]))
    lengths = {name: mean([row["rms"] for row in own]) for name, own in found.items()}
    muon = lengths.get(MUON, math.nan)
    unmatched = [f"{n} {v / muon:.2f}" for n, v in lengths.items() if not abs(v / muon - 1) <= MATCHED]
    level = SIGNIFICANT / max(1, len(losses) - 1)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for name in ranked:
        pairs = _pairs(found.get(MUON, []), found[name]) if name != MUON else ([], [])
        if p_value(*pairs, paired=True) < level:
            sides[mean(pairs[1]) < mean(pairs[0])].append(name)
    seeds = len(found.get(MUON, next(iter(found.values()))))
    return Verdict(
        "final loss of every map at matched update RMS",
        "not known (figure 7)",
        "; ".join(f"{name} {summary(losses[name], 3)}" for name in ranked),
        OUT_OF_REACH,
        f"nothing is published to compare with. Against {MUON} (paired by seed, n = {seeds}, p < {level:.2g}, which is "
        f"{SIGNIFICANT:g} over {len(losses) - 1} comparisons) lower: {', '.join(sides[True]) or 'none'}; higher: "
        f"{', '.join(sides[False]) or 'none'}. Lengths of updates within {MATCHED:.0%} of {MUON}'s"
        + (f", but for {', '.join(unmatched)}" if unmatched else "")
        + "; one lr for all, tuned for none",
    )


def _pairs(first: Sequence[Row], second: Sequence[Row]) -> tuple[list[float], list[float]]:
    ours, theirs = ({row["seed"]: row["loss"] for row in rows} for rows in (first, second))
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[s] for s in seeds], [theirs[s] for s in seeds]
