"""Pictures of best learning rates, sweeps and layers' changes against width."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from schatten.lab.experiments.width_transfer.contenders import CONTENDERS
from schatten.lab.experiments.width_transfer.fits import by_width, sweeps, vertices
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "sweeps": "Final training loss against learning rate for each width, means over seeds; the minimum stays or wanders.",
    "widths": "Against width: the best learning rate relative to the narrowest's; the RMS change of the head's outputs after a "
    "few steps at one lr, relative to the narrowest's; the loss with the narrowest's best lr (means and range over seeds).",
}


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    from matplotlib.figure import Figure

    present = [c.name for c in CONTENDERS if sweeps(rows, c.name)]
    if not present:
        return {}
    figure = Figure(figsize=(2.5 * max(2, len(present)), 3.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(present), sharey=True))
    widths = sorted({w for name in present for w in sweeps(rows, name)})
    for axes, name in zip(panels, present, strict=True):
        _sweep(axes, rows, name, widths)
    panels[0].set_ylabel("training loss, nats")
    panels[-1].legend(title="width", fontsize=7, title_fontsize=7, frameon=False)
    second = Figure(figsize=(10.4, 3.9), layout="constrained")
    left, middle, right = second.subplots(1, 3)
    for name, colour in colours(present).items():
        best = vertices(rows, name)
        start = np.array(best[min(best)])
        _against(left, {w: 2.0 ** (np.array(ks) - start) for w, ks in best.items()}, colour, name)
        changes = by_width(rows, "coordinates", name, lambda r: r["change"][-1] if r["change"] else None)
        if changes:
            start = np.array(changes[min(changes)])
            _against(middle, {w: np.array(c) / start for w, c in changes.items()}, colour, name)
        losses = by_width(rows, "transfer", name, lambda r: r["loss"] if math.isfinite(r["loss"]) else None)
        _against(right, {w: np.array(values) for w, values in losses.items()}, colour, name)
    left.set_ylabel("best lr / that of the narrowest")
    middle.set_ylabel("change of the head's output, relative")
    right.set_ylabel("training loss at the narrowest's best lr, nats")
    left.legend(fontsize=7, frameon=False)
    return {"sweeps": figure, "widths": second}


def _sweep(axes: "Axes", rows: Sequence[Row], name: str, widths: Sequence[int]) -> None:
    for i, width in enumerate(widths):
        of = list(sweeps(rows, name).get(width, {}).values())
        points = {k: np.mean([losses[k] for losses in of if k in losses]) for losses in of for k in losses}
        finite = sorted(k for k, loss in points.items() if math.isfinite(loss))
        values = [points[k] for k in finite]
        axes.plot(
            [2.0**k for k in finite], values, "o-", color=COLOURS[i % len(COLOURS)], markersize=3, linewidth=1, label=width
        )
    axes.set_title(name, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("lr")
    axes.grid(alpha=0.25, linewidth=0.5)


def _against(axes: "Axes", values: Mapping[int, np.ndarray], colour: str, name: str) -> None:
    """Means with their range over seeds, on logarithmic axes."""
    widths = sorted(values)
    if not widths:
        return
    center = [values[w].mean() for w in widths]
    axes.plot(widths, center, "o-", color=colour, markersize=3, linewidth=1, label=name)
    axes.fill_between(
        widths, [values[w].min() for w in widths], [values[w].max() for w in widths], color=colour, alpha=0.15, linewidth=0
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("width")
    axes.grid(alpha=0.25, linewidth=0.5)
