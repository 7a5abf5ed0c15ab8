"""Two pictures: loss against learning rate, ours above the published, and loss against the power."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from schatten.lab import plots
from schatten.lab.experiments.spectral_powers.published import ADAM, BEST, LOSSES, MSGD, SMALL, name
from schatten.lab.experiments.spectral_powers.reading import by_variant, tuned
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = (MSGD, ADAM)

CAPTIONS = {
    "lr": "Loss against the matrix learning rate, ours on the tuning seed above, the published below; crosses diverged.",
    "power": "Loss against p, mean and standard deviation over seeds; powers beside 0, 1/4, 1/2 and 1 at an interpolated lr.",
}


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    found = {}
    grids = tuned(rows)
    if grids:
        found["lr"] = _lr(grids)
    seeds = {**by_variant(rows, "final"), **by_variant(rows, "between")}
    finals = {key: [row["score"] for row in own] for key, own in seeds.items()}
    if finals:
        found["power"] = _power(finals)
    return found


def _lr(grids: Mapping[tuple[str, float], Mapping[float, float]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    panels = figure.subplots(2, 2)
    powers = plots.colours([f"{p:g}" for p in sorted({p for _, p in (*grids, *LOSSES)})])
    for row, (whose, losses) in enumerate((("ours", grids), ("GPT-2 124M, published", LOSSES))):
        for axes, family in zip(panels[row], FAMILIES, strict=True):
            own = {p: found for (f, p), found in sorted(losses.items()) if f == family}
            ceiling = max((v for found in own.values() for v in found.values() if math.isfinite(v)), default=1.0)
            for p, found in own.items():
                good = {lr: v for lr, v in sorted(found.items()) if math.isfinite(v)}
                axes.plot(list(good), list(good.values()), "o-", color=powers[f"{p:g}"], ms=4, label=name(family, p))
                bad = [lr for lr, v in found.items() if not math.isfinite(v)]
                axes.plot(bad, [ceiling] * len(bad), "x", color=powers[f"{p:g}"], ms=8)
            axes.set_xscale("log")
            axes.set_title(f"{family} family, {whose}", fontsize=10)
            _finish(axes)
            if own:
                axes.legend(frameon=False, fontsize=8)
        panels[row][0].set_ylabel("validation loss, nats per token")
    for axes in panels[1]:
        axes.set_xlabel("matrix learning rate")
    return figure


def _power(finals: Mapping[tuple[str, float], Sequence[float]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    colours = plots.colours(FAMILIES)
    for family in FAMILIES:
        own = {p: losses for (f, p), losses in sorted(finals.items()) if f == family and all(map(math.isfinite, losses))}
        errors = [0.0 if math.isnan(spread(losses)) else spread(losses) for losses in own.values()]
        style = {"marker": "o", "capsize": 3, "color": colours[family], "label": f"{family} family"}
        panels[0].errorbar(list(own), [mean(losses) for losses in own.values()], errors, **style)
        for axes, found in zip(panels[1:], (SMALL, BEST), strict=True):
            theirs = {p: loss for (f, p), loss in sorted(found.items()) if f == family}
            axes.plot(list(theirs), list(theirs.values()), "o-", color=colours[family])
    for axes, title in zip(panels, ("ours", "0.8M, independent run", "GPT-2 124M, published"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("power p")
        _finish(axes)
    panels[0].set_ylabel("best validation loss")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False, fontsize=8)
    return figure


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
