"""Steps against the condition number, and the curves whose end the decay of the lr sets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from schatten.lab.experiments.preconditioning.descent import METHODS
from schatten.lab.experiments.preconditioning.published import PUBLISHED_CAP, STEPS
from schatten.lab.experiments.preconditioning.verdicts import chosen
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS
from schatten.lab.statistics import mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(rows: Sequence[Row]) -> "dict[str, Figure]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.2), layout="constrained")
    counts = figure.subplots(1, 3)
    for axes, name in zip(counts, ("factorisation", "attention"), strict=False):
        for method, colour in zip(METHODS, COLOURS, strict=False):
            for phase, style in (("published", "-"), ("tuned", ":")):
                of = sorted(chosen(rows, phase=phase, problem=name, method=method), key=lambda row: row["kappa"])
                if of:
                    y = [mean([min(s, row["cap"]) for s in row["steps"]]) for row in of]
                    label = f"{method}, {'published lr' if phase == 'published' else 'tuned'}"
                    axes.plot([row["kappa"] for row in of], y, style, color=colour, marker=".", label=label)
            rotated = chosen(rows, phase="tuned", problem="rotated attention", method=method)
            if name == "attention" and method == "Adam" and rotated:
                of = sorted(rotated, key=lambda row: row["kappa"])
                y = [mean([min(s, row["cap"]) for s in row["steps"]]) for row in of]
                axes.plot([row["kappa"] for row in of], y, "-.", color=colour, marker=".", label="Adam, tuned, rotated")
            numbers = {k: min(s, PUBLISHED_CAP) for k, s in STEPS.get((name, method), {}).items()}
            axes.plot(list(numbers), list(numbers.values()), "o", color=colour, markerfacecolor="none", markersize=9)
        axes.set_title(name)
        axes.set_xlabel("condition number")
        axes.set_ylabel("steps to 1e-6")
    right = counts[-1]
    shown = [
        row for row in chosen(rows, problem="factorisation", method="Muon", kappa=10) if row["phase"] not in ("tune", "tuned")
    ]
    for i, row in enumerate(sorted(shown, key=lambda row: (row["q"], row["lr"]))):
        label = f"constant lr {row['lr']:g}" if row["q"] == 1 else f"lr {row['lr']:g} x {row['q']:g}$^t$"
        steps, errors = zip(*row["curve"], strict=True)
        right.plot(steps, errors, color=COLOURS[i % len(COLOURS)], label=label)
    right.set_title("factorisation, condition number 10, Muon")
    right.set_xlabel("steps")
    right.set_ylabel("relative residual")
    for axes in counts:
        if axes is not right:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return {"steps": figure}
