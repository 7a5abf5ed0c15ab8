"""The pictures of a sweep: loss against one setting, and all settings side by side; for print and for the browser."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from schatten.lab.plots import COLOURS
from schatten.lab.sweep_results import Result

# Of a span, the parts of which the best trial is joined by a line.
BINS = 10

# Losses further above the best than so many times the median are drawn in one colour and at one height: runs on the way to
# divergence would flatten all others.
CUT = 2.0

COLOUR_MAP = "viridis"


def varied(space: Mapping[str, Any]) -> list[str]:
    """The names that take more than one value."""
    return [name for name, entry in space.items() if isinstance(entry, Mapping) or len(entry) > 1]


def sensitivity(found: Sequence[Result], space: Mapping[str, Any], name: str, axis: str) -> Figure:
    """Loss against the setting `name`; the line joins the best trials, whatever their other settings were.

    Crosses at the top diverged; open circles were pruned, at their last evaluation.
    """
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    logarithmic = _logarithmic(space[name])
    complete = [r for r in found if r.state == "complete"]
    pruned = [r for r in found if r.state == "pruned" and math.isfinite(r.loss)]
    diverged = [r for r in found if r.state == "diverged" or (r.state == "pruned" and not math.isfinite(r.loss))]
    ended = [r.loss for r in (*complete, *pruned)]
    top = ceiling(ended) if ended else 1.0
    above = top + 0.05 * (top - min(ended, default=0.0))
    best = _best(complete, space[name], name)
    if len(best) > 1:
        axes.plot([r.params[name] for r in best], [min(r.loss, top) for r in best], color=COLOURS[0], label="best")
    marks: tuple[tuple[list[Result], dict[str, Any], str], ...] = (
        (complete, {"marker": "o", "color": COLOURS[0], "alpha": 0.6}, "complete"),
        (pruned, {"marker": "o", "markerfacecolor": "none", "color": COLOURS[6]}, "pruned, at its last evaluation"),
        (diverged, {"marker": "x", "color": COLOURS[1]}, "diverged (inf)"),
    )
    for rows, style, label in marks:
        if rows:
            heights = [min(r.loss, top) if math.isfinite(r.loss) else above for r in rows]
            axes.plot([r.params[name] for r in rows], heights, linestyle="none", label=label, **style)
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlabel("learning rate" if name == "lr" else name)
    cut = any(r.loss > top and math.isfinite(r.loss) for r in found)
    axes.set_ylabel(f"{axis}{f', cut at {top:.3g}' if cut else ''}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def parallel(found: Sequence[Result], space: Mapping[str, Any], axis: str) -> Figure:
    """Each complete trial as a line through its settings to its loss; dark is low."""
    names = varied(space)
    figure = Figure(figsize=(2.4 + 1.7 * len(names), 4.4), layout="constrained")
    axes = figure.add_subplot()
    complete = sorted((r for r in found if r.state == "complete"), key=lambda r: -r.loss)
    losses = [r.loss for r in complete]
    low, top = (min(losses), ceiling(losses)) if losses else (0.0, 1.0)
    colour = Normalize(low, top, clip=True)
    places = {name: _place(space[name]) for name in names}
    for r in complete:
        heights = [places[name](r.params[name]) for name in names] + [float(colour(r.loss))]
        axes.plot(heights, color=matplotlib.colormaps[COLOUR_MAP](colour(r.loss)), alpha=0.7, linewidth=1.2)
    for i, name in enumerate(names):
        for value in _ticks(space[name]):
            axes.text(i - 0.03, places[name](value), f"{value:.3g}", ha="right", va="center", fontsize=8, bbox=_BACK)
    last = len(names)
    for share in (0, 0.25, 0.5, 0.75, 1):
        more = "≥ " if share == 1 and losses and max(losses) > top else ""
        axes.text(last + 0.03, share, f"{more}{low + share * (top - low):.4g}", ha="left", va="center", fontsize=8)
    for i in range(last + 1):
        axes.axvline(i, color="#444444", linewidth=0.8)
    axes.set_xticks(range(last + 1), [*names, axis])
    axes.set_xlim(-0.4, last + 0.4)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def interactive(found: Sequence[Result], space: Mapping[str, Any], axis: str) -> str:
    """The same as HTML of plotly, whose axes can be narrowed and moved, with its script inline."""
    from plotly import graph_objects

    names = varied(space)
    complete = [r for r in found if r.state == "complete"]
    losses = [r.loss for r in complete]
    low, top = min(losses), ceiling(losses)
    dimensions = []
    for name in names:
        place, ticks = _place(space[name]), _ticks(space[name])
        values = [place(r.params[name]) for r in complete]
        shown = {"tickvals": [place(t) for t in ticks], "ticktext": [f"{t:.3g}" for t in ticks]}
        dimensions.append({"label": name, "values": values, "range": [0, 1], **shown})
    dimensions.append({"label": axis, "values": [min(loss, top) for loss in losses], "range": [low, top]})
    line = {"color": losses, "colorscale": "Viridis", "cmin": low, "cmax": top}
    figure = graph_objects.Figure(graph_objects.Parcoords(line=line, dimensions=dimensions, **_FONTS))
    figure.update_layout(height=460, margin={"l": 70, "r": 70, "t": 60, "b": 30}, template="plotly_white")
    return figure.to_html(full_html=False, include_plotlyjs="inline", config={"displayModeBar": False})


def ceiling(losses: Sequence[float]) -> float:
    """Where pictures cut losses off."""
    low, high = min(losses), max(losses)
    top = min(high, low + CUT * (float(np.median(losses)) - low))
    # All equal: a scale still needs two ends.
    return top if top > low else low + (abs(low) or 1.0) * 1e-3


_FONTS = {"labelfont": {"size": 14}, "tickfont": {"size": 12}, "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"}}

_BACK = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}


def _logarithmic(entry: Any) -> bool:
    if isinstance(entry, Mapping):
        return entry["log"]
    return min(entry) > 0 and max(entry) >= 10 * min(entry)


def _place(entry: Any) -> Callable[[float], float]:
    """The height in [0, 1] of a value: by the scale of a span, evenly spaced for a list."""
    if isinstance(entry, Mapping):
        scale = math.log if entry["log"] else float
        low, high = scale(entry["low"]), scale(entry["high"])
        return lambda value: (scale(value) - low) / (high - low)
    ordered = sorted(entry)
    return lambda value: ordered.index(value) / max(1, len(ordered) - 1)


def _ticks(entry: Any) -> list[float]:
    if not isinstance(entry, Mapping):
        return sorted(entry)
    low, high = entry["low"], entry["high"]
    if not entry["log"]:
        return np.linspace(low, high, 5).tolist()
    decades = [10.0**k for k in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]
    return decades if len(decades) > 1 else np.geomspace(low, high, 4).tolist()


def _best(complete: Sequence[Result], entry: Any, name: str) -> list[Result]:
    """The lowest loss at each value of a list, or in each of BINS equal parts of a span."""
    place = _place(entry) if isinstance(entry, Mapping) else None
    groups: dict[Any, list[Result]] = {}
    for r in complete:
        value = r.params[name]
        groups.setdefault(value if place is None else min(BINS - 1, int(BINS * place(value))), []).append(r)
    return sorted((min(group, key=lambda r: r.loss) for group in groups.values()), key=lambda r: r.params[name])
