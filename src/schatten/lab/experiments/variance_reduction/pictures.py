"""The pictures of variance_reduction."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from schatten.lab.experiments.variance_reduction.networks import RULES
from schatten.lab.experiments.variance_reduction.rates import ESTIMATORS
from schatten.lab.experiments.variance_reduction.verdicts import of
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS


def pictures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """`rates` and `images`, each where there are rows for it."""
    found = {"rates": _rates(rows), "images": _images(rows)}
    return {name: figure for name, figure in found.items() if figure is not None}


def _rates(rows: Sequence[Row]) -> Figure | None:
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for estimator, colour in zip(ESTIMATORS, COLOURS, strict=False):
        runs = [row for row in of(rows, "rates", "rate", estimator.name) if row["norms"]]
        if not runs:
            continue
        x = estimator.gradients * np.array(runs[0]["steps"])
        y = np.array([row["norms"] for row in runs if len(row["norms"]) == len(x)])
        axes.plot(x, y.mean(axis=0), color=colour, marker="o", markersize=3, label=estimator.name)
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        if estimator.bound:
            line = y.mean(axis=0)[-1] * (x / x[-1]) ** -estimator.bound
            axes.plot(x, line, color=colour, linestyle="--", linewidth=1, label=f"T^-1/{1 / estimator.bound:.0f}")
    if not axes.lines:
        return None
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("evaluations of the gradient")
    axes.set_ylabel("mean gradient norm over the second half")
    axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _images(rows: Sequence[Row]) -> Figure | None:
    losses = {name: [row["loss"] for row in of(rows, "images", "final", name)] for name in RULES}
    shown = {name: [v for v in values if np.isfinite(v)] for name, values in losses.items()}
    shown = {name: values for name, values in shown.items() if values}
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (values, colour) in enumerate(zip(shown.values(), COLOURS, strict=False)):
        axes.plot([i] * len(values), values, "o", color=colour, alpha=0.7)
        axes.plot([i - 0.25, i + 0.25], [np.mean(values)] * 2, color=colour, linewidth=2)
    axes.set_xticks(range(len(shown)), list(shown))
    axes.set_ylabel("final validation loss, nats")
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
