"""The pictures of trust_region."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from schatten.lab.experiments.trust_region.methods import METHODS
from schatten.lab.experiments.trust_region.rates import THEOREMS
from schatten.lab.experiments.trust_region.verdicts import finals
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS

TITLES = {"l2": "l2 penalty", "nuclear": "nuclear norm", "ball": "spectral ball"}

CAPTIONS = {
    "gaps": "Distance of the objective from its known minimum against steps, each method at its best lr: geometric mean "
    "over seeds.",
    "rates": "Left the mean nuclear norm of the residual, right the last gap, against the number of steps T: every seed a "
    "dot, the line their mean; dashed the slope of the bound.",
}


def pictures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """`gaps` and `rates`, each where there are rows for it."""
    found = {"gaps": _gaps(rows), "rates": _rates(rows)}
    return {name: figure for name, figure in found.items() if figure is not None}


def _gaps(rows: Sequence[Row]) -> Figure | None:
    kinds = [kind for kind in METHODS if any(finals(rows, kind, method.name) for method in METHODS[kind])]
    if not kinds:
        return None
    names = list(dict.fromkeys(method.name for methods in METHODS.values() for method in methods))
    palette = dict(zip(names, COLOURS, strict=False))
    figure = Figure(figsize=(3.6 * len(kinds), 4.2), layout="constrained")
    handles = {}
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for method in METHODS[kind]:
            runs = finals(rows, kind, method.name)
            count = min((len(row["gaps"]) for row in runs), default=0)
            if count < 2:
                continue
            # Outside the ball F may lie below the minimum: a distance is shown.
            gaps = np.abs([row["gaps"][1:count] for row in runs]) + 1e-12
            (line,) = axes.plot(runs[0]["steps"][1:count], np.exp(np.log(gaps).mean(axis=0)), color=palette[method.name])
            handles[method.name] = line
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(TITLES[kind], fontsize=10)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("distance from the minimum")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _rates(rows: Sequence[Row]) -> Figure | None:
    own = [row for row in rows if row.get("part") == "rates"]
    if not own:
        return None
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    for axes, theorem, colour in zip(figure.subplots(1, len(THEOREMS)), THEOREMS, COLOURS, strict=False):
        found = [row for row in own if row["theorem"] == theorem.name]
        T = np.array(sorted({row["steps"] for row in found}), dtype=float)
        if not len(T):
            continue
        means = np.array([np.mean([row[theorem.quantity] for row in found if row["steps"] == steps]) for steps in T])
        axes.plot(
            [row["steps"] for row in found],
            [row[theorem.quantity] for row in found],
            "o",
            color=colour,
            alpha=0.6,
            markersize=4,
        )
        axes.plot(T, means, color=colour)
        axes.plot(T, means[0] * (T / T[0]) ** -theorem.bound, "--", color="#7F7F7F", label=f"T^-{theorem.bound:.3g}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(T, [f"{t:g}" for t in T], fontsize=8)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_xlabel("steps T")
        axes.set_ylabel(theorem.what)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
