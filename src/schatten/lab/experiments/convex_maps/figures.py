"""Pictures: losses and residuals of all maps, and the singular values that they leave."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from schatten.lab.experiments.convex_maps.comparison import FALLEN, finals
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS
from schatten.lab.statistics import mean

CAPTIONS = {
    "losses": "All maps at the same root mean square of updates, a point for each seed. Left: final validation loss. Right: "
    "the relative Fenchel-Young residual of each map's own problem at the start (hollow) and at the end; a cross is the median "
    "of the same weights in the problems of the other maps.",
    "spectra": "Singular values of the hidden matrices at the end, of all seeds; a bar where the domain of K* ends for the "
    "largest of them, if it does. Maps are in the order of their losses.",
}

BLUE, ORANGE = COLOURS[:2]


def pictures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """Both, of the maps that have rows."""
    found = finals(rows)
    names = sorted((n for n in found if np.isfinite([r["loss"] for r in found[n]]).all()), key=lambda n: -mean_loss(found[n]))
    return {"losses": _losses(found, names), "spectra": _spectra(found, names)} if names else {}


def mean_loss(rows: Sequence[Row]) -> float:
    return mean([row["loss"] for row in rows])


def _losses(found: Mapping[str, Sequence[Row]], names: Sequence[str]) -> Figure:
    figure = Figure(figsize=(11.0, 1.4 + 0.28 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(names):
        own = found[name]
        left.plot([row["loss"] for row in own], [y] * len(own), "o", color=BLUE, markersize=4, alpha=0.8)
        for i, style in ((0, {"markerfacecolor": "none"}), (1, {})):
            right.plot([row["residual"][i] for row in own], [y] * len(own), "o", color=BLUE, markersize=4, **style)
        others = [v for row in own for key, v in row["others"].items() if key != name]
        if others:
            right.plot(np.median(others), y, "x", color=ORANGE, markersize=6)
    left.set_yticks(range(len(names)), names)
    left.set_xscale("log")
    left.set_xlabel("final validation loss")
    right.set_xlabel("relative Fenchel-Young residual")
    right.set_xscale("log")
    right.axvline(FALLEN, color="black", linestyle=":", linewidth=1)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _spectra(found: Mapping[str, Sequence[Row]], names: Sequence[str]) -> Figure:
    figure = Figure(figsize=(8.4, 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for y, name in enumerate(names):
        values = [s for row in found[name] for s in row["sigma"]]
        axes.plot(values, [y] * len(values), "|", color=BLUE, markersize=7, alpha=0.35)
        radius = found[name][0]["radius"]
        if radius is not None and np.isfinite(radius):
            axes.plot(radius, y, "|", color=ORANGE, markersize=13, markeredgewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("singular value")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure
