"""Every number of the reconstruction beside ours, then the paper's claims."""

import math
from collections.abc import Sequence

from scipy import stats

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.preconditioning.descent import GRIDS
from schatten.lab.experiments.preconditioning.problems import PROBLEMS
from schatten.lab.experiments.preconditioning.published import BY_DECAY, PUBLISHED_CAP, STALLS, STEPS, Q
from schatten.lab.ledger import Row
from schatten.lab.statistics import compared, line, mean, p_value, spread, summary

# Steps ~ kappa^slope. Free of kappa: thousandfold kappa changes the count by less than 1000^0.05 = 1.41.
FREE = 0.05


def check(rows: Sequence[Row]) -> list[Verdict]:
    """Every number of the table, then the claims: free of kappa, and against tuned Adam."""
    found = []
    for (name, method), numbers in STEPS.items():
        for kappa, published in numbers.items():
            for row in chosen(rows, phase="published", problem=name, method=method, kappa=kappa):
                found.append(count(f"{name}, kappa {kappa:g}: steps of {method}", published, row))
    for kappa, numbers in BY_DECAY.items():
        for q, published in numbers.items():
            for row in chosen(
                rows, phase="decay" if q != Q else "published", problem="factorisation", method="Muon", kappa=kappa
            ):
                if row["q"] == q:
                    found.append(count(f"factorisation, kappa {kappa:g}: steps of Muon with decay {q:g}", published, row))
    for lr, (low, high) in STALLS.items():
        if stalled := [row for row in chosen(rows, phase="constant") if row["lr"] == lr]:
            found.append(stall(lr, low, high, stalled))
    for name in PROBLEMS:
        for method in ("Muon", "GD"):
            found += growth(rows, name, method)
        found += against_adam(rows, name)
    return found


def chosen(rows: Sequence[Row], **where: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def reach(values: Sequence[float]) -> float:
    """How far one more draw lies from the mean of these at most, with probability 0.95: t s sqrt(1 + 1/n)."""
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1)) * spread(values) * math.sqrt(1 + 1 / n)


def count(quantity: str, published: float, row: Row) -> Verdict:
    """A number of steps: exact where nothing is drawn, else one draw among ours."""
    steps, cap = row["steps"], row["cap"]
    if math.isinf(published):
        ours = f"> {cap}" if min(steps) == math.inf else said(steps, cap)
        if cap < PUBLISHED_CAP and min(steps) == math.inf:
            return Verdict(quantity, "> 20000 (derived)", ours, OUT_OF_REACH, f"these runs ended after {cap} steps")
        return verdict(quantity, "> 20000 (derived)", ours, min(steps) > PUBLISHED_CAP, "every seed must need more")
    text = f"{published:g} (derived)"
    if row["problem"] == "attention":
        return verdict(quantity, text, said(steps, cap), steps[0] == published, "nothing is drawn: the same number to the step")
    if not math.isfinite(spread(steps)):
        why = f"needs two seeds or more that arrive within {cap} steps"
        return Verdict(quantity, text, said(steps, cap), OUT_OF_REACH, why)
    off, allowed = abs(mean(steps) - published), reach(steps)
    return verdict(
        quantity, text, summary(steps), off <= allowed, f"off by {off:.0f}; a draw more is within {allowed:.0f} (95 %)"
    )


def said(steps: Sequence[float], cap: int) -> str:
    """`summary`, in which runs that did not arrive are that and not diverged."""
    missing = sum(math.isinf(s) for s in steps)
    if missing == len(steps):
        return f"> {cap} (n = {missing})"
    return summary([s for s in steps if math.isfinite(s)]) + (f", {missing} more > {cap}" if missing else "")


def stall(lr: float, low: float, high: float, rows: Sequence[Row]) -> Verdict:
    lowest = [value for row in rows for value in row["lowest"]]
    allowed = reach(lowest)
    holds = low - allowed <= mean(lowest) <= high + allowed and min(min(row["steps"]) for row in rows) == math.inf
    text = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    why = f"least residual of the last 100 of {rows[0]['cap']} steps, none arrives; a draw more is within {allowed:.2g} (95 %)"
    return verdict(
        f"factorisation: constant lr {lr:g} stalls at a residual of", f"{text} (derived)", summary(lowest), holds, why
    )


def growth(rows: Sequence[Row], name: str, method: str) -> list[Verdict]:
    """The exponent of steps ~ kappa^slope where all seeds arrive, from kappa 10 on."""
    of = [row for row in chosen(rows, phase="published", problem=name, method=method) if row["kappa"] >= 10]
    arrived = [row for row in of if max(row["steps"]) < math.inf]
    quantity = f"{name}: steps grow as kappa to the power, {method}"
    if len(arrived) < 2:
        # One point and then only runs that never arrive are a growth too, of at least so much.
        if method == "Muon" or len(arrived) == len(of):
            return []
        first, beyond = arrived[0] if arrived else None, next(row for row in of if row not in arrived)
        if first is None:
            return []
        slope = math.log(beyond["cap"] / mean(first["steps"])) / math.log(beyond["kappa"] / first["kappa"])
        why = f"from kappa {first['kappa']:g} to {beyond['kappa']:g}, where the cap of {beyond['cap']} is a lower bound"
        return [verdict(quantity, "> 0: GD depends on kappa (paper)", f"> {slope:.2f}", slope > FREE, why)]
    x = [math.log(row["kappa"]) for row in arrived for _ in row["steps"]]
    slope, error = line(x, [math.log(s) for row in arrived for s in row["steps"]])
    ours = f"{slope:.3f} +- {error:.3f} (standard error)"
    span = f"kappa {arrived[0]['kappa']:g} to {arrived[-1]['kappa']:g}"
    why = f"{span}; below {FREE} a thousandfold kappa changes the steps by a factor within 1.41"
    if method == "Muon":
        return [verdict(quantity, "0: free of kappa (paper)", ours, abs(slope) + 2 * error < FREE, why)]
    return [verdict(quantity, "> 0: GD depends on kappa (paper)", ours, slope - 2 * error > FREE, why)]


def against_adam(rows: Sequence[Row], name: str) -> list[Verdict]:
    """Steps of tuned Muon and Adam at each kappa, and whether Adam's grow."""
    found, series = [], {}
    for method in ("Muon", "Adam"):
        series[method] = {row["kappa"]: row for row in chosen(rows, phase="tuned", problem=name, method=method)}
    shared = sorted(k for k in series["Muon"] if k in series["Adam"] and k >= 10)
    if len(shared) > 1:
        first, last = (series["Adam"][k] for k in (shared[0], shared[-1]))
        cap, ends = last["cap"], [min(s, last["cap"]) for s in last["steps"]]
        grown = mean(ends) / min(mean(first["steps"]), cap)
        why = f"> 2 counts as dependence; runs beyond the cap of {cap} count as {cap}; lr and decay tuned at each kappa"
        quantity = f"{name}: tuned Adam's steps at kappa {shared[-1]:g} over those at {shared[0]:g}"
        found.append(verdict(quantity, "> 1: Adam depends on kappa (paper)", f"{grown:.2f}", grown > 2, why))
    for kappa in shared:
        muon, adam = (series[method][kappa] for method in ("Muon", "Adam"))
        cap = adam["cap"]
        both = [[min(s, cap) for s in row["steps"]] for row in (muon, adam)]
        fewer = mean(both[0]) < mean(both[1])
        ours = f"{said(muon['steps'], cap)} against {said(adam['steps'], cap)}"
        settings = f"lr {muon['lr']:g}, q {muon['q']:g} against lr {adam['lr']:g}, q {adam['q']:g}; {edges(muon, adam)}"
        if name == "attention":
            holds, claim = fewer, "nothing is drawn"
        else:
            # Of logarithms: a run that ends at the cap would drown the others.
            logs = [[math.log(s) for s in steps] for steps in both]
            holds, claim = fewer and p_value(*logs, paired=True) < 0.05, f"{compared(*logs)} of log steps"
        quantity = f"{name}, kappa {kappa:g}: tuned Muon needs fewer steps than tuned Adam"
        found.append(verdict(quantity, "fewer (paper); not consistently (2607.13246)", ours, holds, f"{claim}; {settings}"))
    return found


def edges(*rows: Row) -> str:
    """Which best lr or decays lie at the ends of their grids; no decay, q = 1, is no end."""
    at = []
    for row in rows:
        lrs, decays = (sorted(set(column)) for column in zip(*GRIDS[row["method"]], strict=True))
        at += [f"{row['method']}'s lr"] * (row["lr"] in (lrs[0], lrs[-1]))
        at += [f"{row['method']}'s q"] * (row["q"] == decays[0] < decays[-1])
    return f"at the edge of the grid: {', '.join(at)}" if at else "none at the edge of its grid"
