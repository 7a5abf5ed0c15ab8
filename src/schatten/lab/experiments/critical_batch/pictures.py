"""Pictures of steps, gradients and bounds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from schatten.lab.experiments.critical_batch.comparison import FORMS, SETTINGS
from schatten.lab.experiments.critical_batch.curves import Curve, curve, mean_fit
from schatten.lab.experiments.critical_batch.variants import VARIANTS
from schatten.lab.ledger import Row
from schatten.lab.plots import colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "steps": "Steps and gradients to the target against batch size, lr tuned for each batch: geometric means over seeds with "
    "their range, and fits of a(1 + c/b).",
    "one-lr": "Left, the same with one lr for all batches and fits of the bound's form; batches at which a seed did not arrive "
    "are left out. Right, the largest spectral norm in the second half of a run over c/lambda, against lr x lambda.",
}


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    from matplotlib.figure import Figure

    made = {}
    shades = colours([v.name for v in VARIANTS])
    tuned = _curves(rows, "tuned")
    if tuned:
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, of in tuned.items():
            _draw(left, of, of.steps, "tuned", name, shades[name], times=False)
            _draw(right, of, of.gradients, "tuned", name, shades[name], times=True)
        left.set_ylabel("steps to the target, T")
        right.set_ylabel("gradients to the target, N = b T")
        left.legend(fontsize=8, frameon=False)
        made["steps"] = figure
    fixed, bounds = _curves(rows, "fixed"), [r for r in rows if r.get("phase") == "bound" and r["product"] > 0]
    if fixed or bounds:
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, of in fixed.items():
            _draw(left, of, of.gradients, "fixed", name, shades[name], times=True)
        left.set_title(SETTINGS["fixed"], fontsize=9)
        left.set_ylabel("gradients to the target, N = b T")
        if fixed:
            left.legend(fontsize=8, frameon=False)
        _bound(right, bounds)
        made["one-lr"] = figure
    return made


def _curves(rows: Sequence[Row], phase: str) -> dict[str, Curve]:
    found = {v.name: curve(rows, phase, v.name) for v in VARIANTS}
    return {name: of.arrived for name, of in found.items() if of is not None and len(of.arrived.batches)}


def _draw(axes: "Axes", of: Curve, values: np.ndarray, phase: str, name: str, shade: str, *, times: bool) -> None:
    """Means with ranges, and the fit on a finer grid; `times` the batch for gradients."""
    center = np.exp(np.log(values).mean(0))
    errors = np.abs(np.stack([values.min(0), values.max(0)]) - center)
    axes.errorbar(of.batches, center, errors, fmt="o", color=shade, markersize=4, linewidth=1, capsize=2, label=name)
    if len(of.batches) >= 3:
        fit = mean_fit(FORMS[phase], of)
        fine = np.geomspace(of.batches[0], of.batches[-1], 200)
        axes.plot(fine, fit(fine) * (fine if times else 1), color=shade, linewidth=1, alpha=0.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch size b")
    axes.grid(alpha=0.25, linewidth=0.5)


def _bound(axes: "Axes", rows: Sequence[Row]) -> None:
    finite = [r for r in rows if np.isfinite(r["settled"])]
    axes.plot([r["product"] for r in finite], [r["settled"] for r in finite], "o", color="#0072B2", markersize=4)
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle="--")
    axes.axvline(1.0, color="0.5", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("lr x lambda")
    axes.set_ylabel("largest ||W|| over c/lambda, second half")
    axes.grid(alpha=0.25, linewidth=0.5)
