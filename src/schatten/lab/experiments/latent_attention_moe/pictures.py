"""The pictures: loss against steps for both models and optimizers, and Muon's shorter schedules against AdamW's loss."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from schatten.lab.experiments.latent_attention_moe.comparison import finals, shares
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS
from schatten.lab.statistics import mean, summary

NAMES = {"latent-moe": "latent attention + experts", "gpt": "dense"}
STYLES = {"latent-moe": "-", "gpt": "--"}
OPTIMIZERS = {"adamw": ("AdamW", COLOURS[0]), "muon": ("Muon", COLOURS[1])}

CAPTIONS = {
    "training": "Left: validation loss at the best setting of each pair, mean and range over seeds. Right: final loss of "
    "Muon on schedules of a share of the steps, each down to zero, against the loss that AdamW ends with after all of them."
}


def pictures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """One figure, where any model was trained to the end."""
    if not any(r.get("phase") == "final" and r.get("curve") for r in rows):
        return {}
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, rows)
    _schedules(right, rows)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("validation loss, nats per token")
    return {"training": figure}


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    for model, style in STYLES.items():
        for optimizer, (name, colour) in OPTIMIZERS.items():
            curves = [row["curve"] for row in finals(rows, model, optimizer) if row.get("curve")]
            count = min(map(len, curves), default=0)
            if count == 0:
                continue
            steps = [step for step, _ in curves[0][:count]]
            losses = np.array([[loss for _, loss in curve[:count]] for curve in curves])
            axes.plot(steps, losses.mean(0), style, color=colour, marker="o", markersize=3, label=f"{name}, {NAMES[model]}")
            axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("optimizer steps")
    _legend(axes)


def _schedules(axes: Axes, rows: Sequence[Row]) -> None:
    adamw, muon = finals(rows, "latent-moe", "adamw"), finals(rows, "latent-moe", "muon")
    if not adamw or not muon:
        axes.set_axis_off()
        return
    points = [(r["horizon"], r["loss"]) for r in rows if r.get("phase") == "horizon"] + [(1.0, r["loss"]) for r in muon]
    places = sorted({share for share, _ in points})
    groups = [[loss for share, loss in points if share == place] for place in places]
    axes.plot(places, [mean(group) for group in groups], color=COLOURS[1], label="Muon, mean over seeds")
    axes.plot(*zip(*points, strict=True), "o", color=COLOURS[1], markersize=4, alpha=0.6)
    target = [r["loss"] for r in adamw]
    axes.axhline(mean(target), color=COLOURS[0], linestyle="--", label=f"AdamW after all steps: {summary(target)}")
    axes.axhspan(min(target), max(target), color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.axvspan(0.48, 0.52, color=COLOURS[2], alpha=0.25, linewidth=0, label="published share, 0.48-0.52")
    axes.set_title(f"share to AdamW's loss: {summary(shares(rows), 3)}", fontsize=10)
    axes.set_xlabel("Muon's steps as a share of AdamW's")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below, where no line can run through it."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
