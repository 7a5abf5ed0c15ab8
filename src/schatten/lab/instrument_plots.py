"""The pictures of what instruments measure: trajectories against the ball, Lyapunov functions, curvature, spectra over time.

One function each, of plain numbers, so that they draw alike what `Monitor` logged, what a benchmark found and what a paper
printed. Every one returns a matplotlib Figure of its own, without pyplot's global state; the caller saves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from schatten.lab.plots import COLOURS

BLUE, ORANGE, GREEN, PINK = COLOURS[:4]
GREY = "#555555"

Numbers = Sequence[float]

# Values that span more than this factor get a logarithmic axis.
WIDE = 30.0


@dataclass(frozen=True)
class Trajectory:
    """One run in `ball_trajectories`: singular values, a pair for each step; the radius of its ball; where F is smallest."""

    sigma: Sequence[tuple[float, float]]
    radius: float | None = None
    optimum: tuple[float, float] | None = None


@dataclass(frozen=True)
class CurvatureCurve:
    """One run in `curvature_curves`, a number for each step.

    Attributes:
        step: optimizer steps.
        J: curvature along the orthogonalised gradient, in units of the loss.
        L: the largest |eigenvalue| of the Hessian.
        bound: ||G||_*^2 / ||G||_F^2.
        loss: in a panel of its own, if any run has it.
        L_error: half-lengths of error bars.
    """

    step: Numbers
    J: Numbers
    L: Numbers
    bound: Numbers
    loss: Numbers | None = None
    L_error: Numbers | None = None


def ball_trajectories(panels: Mapping[str, Mapping[str, Trajectory]]) -> Figure:
    """Trajectories of two singular values against the spectral ball max(sigma_1, sigma_2) <= c / lambda.

    Args:
        panels: title -> label -> run. Runs of a panel share the plane; balls of equal radius are drawn once. Singular values
            are in the units of the weights, in any order. A circle is a start, a square an end.
    """
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained")
    for axes, (title, runs) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        top = max(max(map(max, run.sigma)) for run in runs.values())
        for radius in sorted({run.radius for run in runs.values() if run.radius is not None}):
            ball = Rectangle((0, 0), radius, radius, facecolor="#DDDDDD", edgecolor=GREY, linewidth=1.2, alpha=0.6, zorder=0)
            ball.set_label(f"ball, c/λ = {radius:.3g}")
            axes.add_patch(ball)
            top = max(top, radius)
        for (label, run), colour in zip(runs.items(), COLOURS, strict=False):
            first, second = np.array(run.sigma).T
            axes.plot(first, second, color=colour, linewidth=1.4, label=label)
            axes.plot(first[:1], second[:1], "o", color=colour, markersize=6)
            axes.plot(first[-1:], second[-1:], "s", color=colour, markersize=7, markeredgecolor="white")
        axes.plot([], [], "o", color=GREY, markersize=6, label="start")
        axes.plot([], [], "s", color=GREY, markersize=6, label="end")
        for optimum in sorted({run.optimum for run in runs.values() if run.optimum is not None}):
            axes.plot(*optimum, "*", color="black", markersize=10, linestyle="none", label="minimum of F")
            top = max(top, *optimum)
        axes.set_xlim(0, 1.06 * top)
        axes.set_ylim(0, 1.06 * top)
        axes.set_aspect("equal")
        axes.set_xlabel("singular value σ₁")
        axes.set_ylabel("singular value σ₂")
        axes.set_title(title, fontsize=10)
        _finish(axes)
    return figure


def lyapunov_curves(step: Numbers, loss: Numbers, excess: Numbers, lyapunov: Numbers, title: str = "") -> Figure:
    """The loss, V_B and V_K of one run, one panel each over the same steps.

    Args:
        step: optimizer steps.
        loss: F, or F - F* where that is known.
        excess: V_B = max(||W||_op - c / lambda, 0), in the units of the weights; the largest of several matrices.
        lyapunov: V_K, in the units of the loss; NaN where it was not measured. Drawn from the first step inside the ball.
    """
    steps, V_B, V_K = np.array(step), np.array(excess), np.array(lyapunov)
    # From where V_B is zero for good a weight counts as inside.
    outside = np.flatnonzero(V_B > 0)
    entry = outside[-1] + 1 if len(outside) else 0
    enters = 0 < entry < len(steps)
    figure = Figure(figsize=(7.2, 6.4), layout="constrained")
    rows = figure.subplots(3, 1, sharex=True)
    for axes, x, y, name, colour in (
        (rows[0], steps, np.array(loss), "loss", GREY),
        (rows[1], steps, V_B, "$V_B$, excess over c/λ", ORANGE),
        (rows[2], steps[entry:], V_K[entry:], "$V_K$, inside the ball", BLUE),
    ):
        axes.plot(x, y, color=colour, linewidth=1.4)
        axes.set_ylabel(name)
        if enters:
            axes.axvline(steps[entry], color=GREY, linestyle="--", linewidth=1, label=f"inside from step {steps[entry]:g}")
        if axes is rows[1] and enters:
            axes.set_ylim(bottom=0)
        else:
            _scale(axes, y)
        _finish(axes, legend=enters and axes is rows[1])
    if not entry < len(steps):
        rows[2].text(0.5, 0.5, "outside at every step", transform=rows[2].transAxes, ha="center", color=GREY)
    rows[0].set_title(title, fontsize=10)
    rows[-1].set_xlabel("optimizer steps")
    return figure


def curvature_curves(
    runs: Mapping[str, CurvatureCurve], against: Mapping[str, CurvatureCurve] | None = None, reference: str = "published"
) -> Figure:
    """J and L over steps above the two sides of the condition J / L <= ||G||_*^2 / ||G||_F^2, one column for each run.

    Args:
        runs: title -> curves.
        against: title -> those of a reference, such as a paper's numbers: hollow marks.
        reference: what the legend calls it.
    """
    with_loss = any(run.loss is not None for run in runs.values())
    figure = Figure(figsize=(4.9 * len(runs), 7.0 if with_loss else 5.6), layout="constrained")
    ratios = [1.0, 2.0, 2.0] if with_loss else [1.0, 1.0]
    grid = figure.subplots(len(ratios), len(runs), squeeze=False, sharex="col", height_ratios=ratios)
    for column, (title, run) in zip(grid.T, runs.items(), strict=True):
        top, bottom = column[-2:]
        step, J, L, bound = (np.array(column) for column in (run.step, run.J, run.L, run.bound))
        top.errorbar(step, J, color=BLUE, marker="o", markersize=4, label="J, along the polar factor")
        top.errorbar(step, L, run.L_error, color=ORANGE, marker="s", markersize=4, capsize=2, label="L, largest |eigenvalue|")
        bottom.plot(step, J / L, color=BLUE, marker="o", markersize=4, label="J / L")
        bottom.plot(step, bound, color=GREEN, marker="^", markersize=4, label="nuc² / fro² of the gradient")
        holds = J / L <= bound
        bottom.fill_between(step, J / L, bound, where=holds.tolist(), color=GREEN, alpha=0.12, linewidth=0)
        if not holds.all():
            bottom.plot(step[~holds], (J / L)[~holds], "x", color="black", markersize=9, label="condition violated")
        shown = [[J, L], [J / L, bound]]
        if against and title in against:
            other = against[title]
            x, J, L, bound = (np.array(column) for column in (other.step, other.J, other.L, other.bound))
            hollow = {"linestyle": "none", "markerfacecolor": "none", "markersize": 7}
            top.plot(x, J, color=BLUE, marker="o", **hollow)
            top.plot(x, L, color=ORANGE, marker="s", **hollow)
            bottom.plot(x, J / L, color=BLUE, marker="o", **hollow)
            bottom.plot(x, bound, color=GREEN, marker="^", **hollow)
            for axes in (top, bottom):
                axes.plot([], [], color=GREY, marker="o", label=reference, **hollow)
            shown = [[*shown[0], J, L], [*shown[1], J / L, bound]]
        for axes, values in zip((top, bottom), shown, strict=True):
            _scale(axes, np.concatenate(values))
            # Curvature grows from small values and J / L is the lower one of two: most often this corner is free.
            _finish(axes, place="lower right")
        if run.loss is not None:
            column[0].plot(step, run.loss, color=GREY, linewidth=1.4)
        if with_loss:
            column[0].set_ylim(bottom=0)
            column[0].set_ylabel("loss")
            _finish(column[0], legend=False)
        column[0].set_title(title, fontsize=10)
        top.set_ylabel("curvature of the loss")
        bottom.set_ylabel("the two sides of the condition")
        bottom.set_xlabel("optimizer steps")
    return figure


def spectrum_history(step: Numbers, spectra: Sequence[Numbers], bound: float | None = None, title: str = "") -> Figure:
    """Singular values over steps as a heat map: each column is a histogram, with lines for the largest and for c / lambda.

    Args:
        step: optimizer steps, one for each spectrum, increasing.
        spectra: singular values of one matrix, or of several pooled; their number may differ from step to step.
        bound: c / lambda, in the units of the weights.

    What is not finite is left out. Raises ValueError if nothing is left.
    """
    rows = [np.array(s, dtype=float) for s in spectra]
    rows = [row[np.isfinite(row)] for row in rows]
    everything = np.concatenate(rows)
    if not len(everything):
        raise ValueError("spectra must have finite singular values, got none at any step.")
    largest = float(everything.max()) or 1.0
    top = 1.15 * max(largest, bound or 0.0)
    # Logarithmic only where most values are small, and down to where 1 % of them lie lower: a few tiny ones, such as those of
    # directions that get no gradient, would leave no room for the rest.
    low = max(float(np.quantile(everything, 0.01)), 1e-4 * largest)
    wide = float(everything.max()) > WIDE * float(np.median(everything))
    edges = np.geomspace(low, top, 49) if wide else np.linspace(0, top, 49)
    shares = np.array([np.histogram(np.clip(s, edges[0], edges[-1]), edges)[0] / max(1, len(s)) for s in rows])
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.pcolormesh(_borders(step), edges, shares.T, cmap="Blues", norm=PowerNorm(0.5, vmin=0), rasterized=True)
    figure.colorbar(image, ax=axes, label="share of the singular values in a bin")
    axes.plot(step, [s.max() if len(s) else np.nan for s in rows], color=ORANGE, linewidth=1.4, label="largest")
    if bound is not None:
        axes.axhline(bound, color="black", linestyle="--", linewidth=1.2, label=f"c/λ = {bound:.3g}")
    if wide:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("singular value")
    axes.set_title(title, fontsize=10)
    _finish(axes)
    axes.grid(visible=False)
    return figure


def _borders(step: Numbers) -> np.ndarray:
    """Edges of columns around steps, halfway between neighbours."""
    x = np.array(step, dtype=float)
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def _scale(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where positive values span a wide range, one from zero where they do not, as it is below zero."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() < 0:
        return
    positive = finite[finite > 0]
    if len(positive) and positive.max() > WIDE * positive.min():
        axes.set_yscale("log")
        few = positive.max() < 1e3 * positive.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if few:
            axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)


def _finish(axes: Axes, legend: bool = True, place: Literal["best", "lower right"] = "best") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(loc=place, framealpha=0.8, edgecolor="none", fontsize=8)
