"""What the rows say about passes, evaluations and memory."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from schatten.lab.experiment import OUT_OF_REACH, Verdict, verdict
from schatten.lab.experiments.zero_order.contenders import JAGUAR, LR
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean, p_value, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The library keeps besides which rows and columns are in the block, (m + n) / (m n) of a matrix's numbers.
MEMORY_TOLERANCE = 0.1

Rows = Sequence[Row]


def check(rows: Rows) -> list[Verdict]:
    """Verdicts for all weights and for LoRA, of what there are rows for."""
    found = []
    for weights in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == weights]
        found += [*_evaluations(own, weights), *_memory(own, weights), *_passes(own, weights)]
    return found


def _final(rows: Rows, name: str | None = None) -> list[Row]:
    chosen = [row for row in rows if row["phase"] == "final" and name in (None, row["optimizer"])]
    return sorted(chosen, key=lambda row: row["seed"])


def _evaluations(rows: Rows, weights: str) -> list[Verdict]:
    own = _final(rows, JAGUAR)
    if not own:
        return []
    each = [row["spent"] / row["steps"] for row in own]
    why = "counted calls of the loss over steps; exactly 2 in every run, whatever the number of matrices"
    return [verdict(f"evaluations a step, {weights}", "O(1)", summary(each), all(x == 2 for x in each), why)]


def _memory(rows: Rows, weights: str) -> list[Verdict]:
    measured = {row["optimizer"]: row for row in rows if row["phase"] == "memory"}
    if JAGUAR not in measured:
        return []
    own = measured[JAGUAR]
    others = ", ".join(f"{name} {row['held']:.2f} and {row['extra']:.2f}" for name, row in measured.items() if name != JAGUAR)
    why = (
        f"within {MEMORY_TOLERANCE:g} d, for the block's rows and columns; d = {own['d']:.0f}. A step holds {own['extra']:.2f} "
        f"d besides: activations, the copy from which weights come back exactly, moves, msign's products; the published "
        f"count has none of these. Held, and in a step besides, by others: {others}"
    )
    holds = abs(own["held"] - 2) <= MEMORY_TOLERANCE
    return [verdict(f"numbers held between steps, {weights}", "2 d + 1", f"{own['held']:.2f} d", holds, why)]


def _passes(rows: Rows, weights: str) -> list[Verdict]:
    ours = _final(rows, JAGUAR)
    if not ours:
        return []
    verdicts = []
    for name in dict.fromkeys(row["optimizer"] for row in _final(rows)):
        theirs = _final(rows, name)
        if name == JAGUAR or not theirs:
            continue
        zero_order = theirs[0]["zero_order"]
        claim = "ahead of zero-order baselines (no number in our reference)" if zero_order else "matching or beating (authors)"
        pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
        # Of a run that never arrived at least the budget is known, which favours it.
        logs = [(math.log(min(a["passes"], a["budget"])), math.log(min(b["passes"], b["budget"]))) for a, b in pairs]
        p = p_value([a for a, _ in logs], [b for _, b in logs], paired=True)
        ratio = math.exp(mean([a - b for a, b in logs]))
        significant = p < 0.05
        # To beat needs a difference that is seen; to match, none that is seen against it.
        holds = ratio < 1 and significant if zero_order else not (ratio > 1 and significant) and not math.isnan(p)
        seen = "no p-value" if math.isnan(p) else f"p = {p:.2g}" + ("" if significant else ", no difference seen")
        lost = [sum(math.isinf(row["passes"]) for row in side) for side in (ours, theirs)]
        why = f"ratio {ratio:.3g} (geometric mean), n = {len(pairs)}, {seen}, paired by seed; to loss {ours[0]['target']:g}"
        if any(lost):
            why += f"; not within {ours[0]['budget']} passes: {lost[0]} and {lost[1]} seeds, taken for the budget"
        why += _edge(ours[0]) + _edge(theirs[0])
        quantity, found = f"forward passes, {weights}: {JAGUAR} against {name}", f"{_taken(ours)} against {_taken(theirs)}"
        if lost == [len(ours), len(theirs)]:
            verdicts.append(Verdict(quantity, claim, found, OUT_OF_REACH, why))
        else:
            verdicts.append(verdict(quantity, claim, found, holds, why))
    return verdicts


def _taken(rows: Rows) -> str:
    arrived = [row["passes"] for row in rows if math.isfinite(row["passes"])]
    never = len(rows) - len(arrived)
    return (summary(arrived) if arrived else "no arrival") + (f", {never} of {len(rows)} never" if never else "")


def _edge(row: Row) -> str:
    """A word on an lr in the outer twentieth of its range."""
    span, lr = LR[row["optimizer"]], row["lr"]
    place = math.log(lr / span.low) / math.log(span.high / span.low)
    if 0.05 < place < 0.95:
        return ""
    return f"; best lr of {row['optimizer']}, {lr:.2g}, at the edge of {span.low:g} .. {span.high:g}"


def pictures(rows: Rows) -> "Mapping[str, Figure]":
    """`passes`: one panel for all weights and one for LoRA."""
    from matplotlib.figure import Figure

    from schatten.lab.plots import colours

    final = [row for row in _final(rows) if row["curve"]]
    if not final:
        return {}
    kinds = list(dict.fromkeys(row["weights"] for row in final))
    names = list(dict.fromkeys(row["optimizer"] for row in final))
    figure = Figure(figsize=(3.4 + 4.6 * len(kinds), 4.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, weights in zip(panels, kinds, strict=True):
        for name, colour in colours(names).items():
            curves = [row["curve"] for row in final if (row["weights"], row["optimizer"]) == (weights, name)]
            # Seeds stop where they reach the target, so a mean goes as far as the first.
            points = np.array([curve[: min(map(len, curves))] for curve in curves], dtype=float)
            if len(points):
                style = {"color": colour, "linewidth": 1.4, "marker": "o", "markersize": 3 if points.shape[1] < 30 else 0}
                axes.plot(*points.mean(axis=0).T, **style, label=name)
        axes.axhline(final[0]["target"], color="#7F7F7F", linestyle="--", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("forward passes")
        axes.set_title(f"trained: {weights}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return {"passes": figure}
