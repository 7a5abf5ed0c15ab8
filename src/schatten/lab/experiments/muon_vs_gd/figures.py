"""The training curves of figure 1, and what figures 2 and 3 and theorem 4.11 show."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from schatten.lab.experiments.muon_vs_gd import quadratic, training
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS
from schatten.lab.statistics import mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pictures(rows: Sequence[Row]) -> "dict[str, Figure]":
    return {"training": training_curves(rows), "theory": theory(rows)}


def training_curves(rows: Sequence[Row]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), training.GRIDS, strict=True):
        for (name, of), colour in zip(training.finals(rows, kind).items(), COLOURS, strict=False):
            losses = np.array([row["losses"] for row in of])
            x = 1 + np.arange(losses.shape[1])
            axes.plot(x, losses.mean(0), color=colour, label=f"{name}, lr {of[0]['lr']:g}")
            axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0)
            if name in training.PUBLISHED[kind]:
                style = {"color": colour, "marker": "o", "markerfacecolor": "none", "linestyle": ""}
                axes.plot(training.AT[kind], training.PUBLISHED[kind][name], **style)
        axes.set_title(kind)
        axes.set_xlabel("step" if kind == "deterministic" else "epoch")
        axes.set_ylabel("training loss")
        # Runs that nearly diverge leave the picture at the top.
        axes.set_ylim(0, 3.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(axes)
        if axes.get_legend() is not None:
            # Below: the curves leave no corner free.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, edgecolor="none", fontsize=8)
    return figure


def theory(rows: Sequence[Row]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 8.0), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    for i, optimizer in enumerate(("Muon", "GD")):
        of = [row for row in rows if row["part"] == "curvature" and row["optimizer"] == optimizer]
        if of:
            x = range(1, 1 + len(of[0]["J"]))
            ratio, bound = (
                [mean([row[above][j] / row[below][j] for row in of]) for j in range(len(of[0]["J"]))]
                for above, below in (("J", "L"), ("nuc^2", "fro^2"))
            )
            a.plot(x, ratio, color=COLOURS[i], marker=".", label=f"{optimizer}, J/L")
            a.plot(x, bound, "--", color=COLOURS[i], label=f"{optimizer}, nuc$^2$/fro$^2$")
    a.set_title("figure 2: curvature along the polar factor")
    a.set_xlabel("reading (Muon: every step, GD: every fifth)")
    a.set_yscale("log")
    for row in rows:
        if row["part"] == "quadratic":
            x = row["every"] * np.arange(len(row["f"]))
            b.plot(x, row["f of GD"], color=COLOURS[1], label="GD, step 1/L")
            b.plot(x, row["f"], color=COLOURS[0], label=f"Muon, step {quadratic.MUON_STEP}")
            b.axvline(quadratic.CROSSING, color="#555555", linestyle="--", linewidth=1, label="published crossing")
            b.plot(
                [0, 4000], [quadratic.START, quadratic.END], "o", color="black", markerfacecolor="none", label="published ends"
            )
        if row["part"] == "histogram":
            edges = np.array(quadratic.EDGES)
            centres = (edges[1:] + edges[:-1]) / 2
            c.bar(centres, row["shares"], width=0.48, color=COLOURS[5], label="found")
            published = np.array(quadratic.COUNTS) / sum(quadratic.COUNTS)
            c.plot(centres, published, "o", color="black", markerfacecolor="none", label="published")
        if row["part"] == "star-convex" and row["step"] == "adaptive":
            d.plot(row["t"], row["error"], color=COLOURS[0], label="adaptive step")
            d.plot(row["t"], row["bound"], "--", color=COLOURS[0], label="its bound")
    constant = sorted((r for r in rows if r["part"] == "star-convex" and r["step"] == "constant"), key=lambda r: r["steps"])
    if constant:
        x = [row["steps"] for row in constant]
        d.plot(x, [mean(row["errors"]) for row in constant], "s", color=COLOURS[2], label="constant step tuned to T, at T")
        d.set_xscale("log")
        d.set_yscale("log")
    b.set_title("figure 3a: the 15 x 20 quadratic")
    b.set_xlabel("steps")
    b.set_ylabel("f")
    c.set_title("figure 3c: $D_F^2 L / (D_{op}^2 L_{sp})$")
    c.set_xlabel("ratio")
    c.set_ylabel("share of samples")
    d.set_title("theorem 4.11 on a convex quadratic")
    d.set_xlabel("steps")
    d.set_ylabel("$f - f^*$")
    for axes in (a, b, c, d):
        finish(axes)
    return figure


def finish(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=8)
