"""Two pictures: what is left of small singular values, and how the error depends on the input's scale."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from schatten.lab import plots
from schatten.lab.experiments.coupled_newton.published import PAPER, POWERS
from schatten.lab.ledger import Row
from schatten.lab.statistics import mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = (PAPER, "converged", "tower", "coupled_minimax", "svd")
LABELS = {PAPER: "published, 15 steps", "converged": "published, many steps"}

CAPTIONS = {
    "damping": "What each solver leaves of s^p of the singular values 1 to 1e-4 (256 of them, fp32): 1 is exact.",
    "scale": "Relative error of c X for the singular values 1 to 1e-2: a power should not see c. Mean over draws.",
}


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    found = {}
    gains = [row for row in rows if row.get("part") == "gain"]
    if gains:
        found["damping"] = _damping(gains)
    scaled = [row for row in rows if row.get("part") == "error" and row["input"] == "1 to 1e-2"]
    if len({row["scale"] for row in scaled}) > 1:
        found["scale"] = _scale(scaled)
    return found


def _damping(rows: Sequence[Row]) -> "Figure":
    figure, panels = _panels()
    for axes, p in zip(panels, POWERS, strict=True):
        for row in (row for row in rows if row["p"] == p):
            for name, colour in plots.colours(CURVES).items():
                style = "--" if name in ("converged", "svd") else "-"
                axes.plot(row["s"], row[name], style, color=colour, label=LABELS.get(name, name))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.1)
        axes.set_xlabel("singular value / largest")
        axes.set_title(f"p = {p}", fontsize=10)
    panels[0].set_ylabel("left of s^p")
    panels[0].legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def _scale(rows: Sequence[Row]) -> "Figure":
    figure, panels = _panels()
    scales = sorted({row["scale"] for row in rows})
    for axes, p in zip(panels, POWERS, strict=True):
        for name, colour in plots.colours(CURVES).items():
            own = [(c, [r[name] for r in rows if (r["scale"], r["p"]) == (c, p)]) for c in scales if name != "converged"]
            points = [(c, mean(values)) for c, values in own if values]
            axes.plot([c for c, _ in points], [e for _, e in points], "o-", color=colour, label=LABELS.get(name, name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("scale c of the input")
        axes.set_title(f"p = {p}", fontsize=10)
    panels[0].set_ylabel("relative error")
    lines = [line for line in panels[0].get_lines() if len(line.get_xdata())]
    panels[1].legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)
    return figure


def _panels():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
