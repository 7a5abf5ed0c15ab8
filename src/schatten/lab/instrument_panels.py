"""The panels that instruments add to a comparison's report, from the records of one run of each optimizer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from schatten.lab import plots
from schatten.lab.instrument_plots import spectrum_history
from schatten.lab.instruments import SPECTRUM
from schatten.monitor import known

Records = Sequence[Mapping[str, Any]]

# Of more optimizers, pictures that show one run each would be more than anybody looks at.
SHOWN = 4


@dataclass(frozen=True)
class Panel:
    """A picture, the name of its file, what to say below it, and whether another fits beside it."""

    name: str
    caption: str
    figure: Figure
    small: bool = False


@dataclass(frozen=True)
class Curve:
    """A column over steps: how layers of one kind are told by one number, and the line's style."""

    column: str
    label: str
    over: Callable[[Sequence[float]], float]
    style: Any = "-"


class Plain(LogFormatter):
    """Labels of a logarithmic axis as 0.4, where matplotlib has 4e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def panels(runs: Mapping[str, Records]) -> Iterator[Panel]:
    """Pictures of what was measured; `runs` has the instruments' records of one run for each optimizer."""
    columns = {key for records in runs.values() for r in records for key, v in r.items() if "/" in key and _number(v)}
    names = sorted({column.partition("/")[0] for column in columns})
    for name in (
        "constraint",
        "curvature",
        "spectrum",
        *(n for n in names if n not in ("constraint", "curvature", "spectrum")),
    ):
        if name in names:
            yield from OWN[name](runs) if name in OWN else _any(name, columns, runs)


def alarms(runs: Mapping[str, Records]) -> list[str]:
    """A sentence for the first alarm of each matrix."""
    told: dict[tuple[str, str], str] = {}
    for optimizer, records in runs.items():
        for r in records:
            for key, value in r.items():
                if key.endswith("/alarm"):
                    told.setdefault((optimizer, r["matrix"]), f"{optimizer}, {r['matrix']}, step {r['step']}: {value}")
    return list(told.values())


def _constraint(runs: Mapping[str, Records]) -> Iterator[Panel]:
    figure = by_kind(runs, [Curve("constraint/ratio", "‖W‖op λ / c", max)], line=1.0, logarithmic=True)
    caption = (
        "Largest singular value over the radius c/λ that decay and shape factor imply, the largest of the layers of a kind, at "
        "the best learning rate, seed 0. Below the dashed line a weight is in its ball. AdamW has none: its ratio is to Muon's."
    )
    yield Panel("instruments_constraint", caption, figure)
    if any(_value(r, "constraint/excess") > 0 for records in runs.values() for r in records):
        figure = by_kind(runs, [Curve("constraint/excess", "V_B", max)], floor=0.0)
        caption = "V_B, how far the largest singular value is above c/λ, the largest of the layers of a kind."
        yield Panel("instruments_excess", caption, figure)


def _curvature(runs: Mapping[str, Records]) -> Iterator[Panel]:
    curves = [Curve("curvature/J", "J", _median), Curve("curvature/L", "L", _median, "--")]
    caption = (
        "Curvature of the loss on a batch that no step sees: J along the orthogonalised gradient, L the largest |eigenvalue| "
        "of the Hessian in the matrix, from below; medians over layers of a kind. Where J is not positive its line has a gap."
    )
    # Of many optimizers the style of a line tells which, not what.
    for name, own in {"J": curves[:1], "L": curves[1:]}.items() if plots.many(runs) else [("curvature", curves)]:
        yield Panel(f"instruments_{name}", caption, by_kind(runs, own, logarithmic=True))
    caption = (
        "The condition J/L ≤ ‖G‖⋆²/‖G‖F² as left over right: below the dashed line an orthogonalised step gains at least what "
        "a gradient step of length 1/L is sure of; below zero the curvature along the orthogonalised gradient is negative."
    )
    ratio = Curve("condition", "(J/L) / (‖G‖⋆²/‖G‖F²)", _median)
    with_ratio = {name: [_with_condition(r) for r in records] for name, records in runs.items()}
    yield Panel("instruments_condition", caption, by_kind(with_ratio, [ratio], line=1.0))


def _spectrum(runs: Mapping[str, Records]) -> Iterator[Panel]:
    for optimizer, records in list(runs.items())[:SHOWN]:
        for label, members in _kinds([r["matrix"] for r in records]).items():
            own = [r for r in records if r["matrix"] in members and "spectrum/weight_histogram" in r]
            steps = sorted({r["step"] for r in own})
            pooled = []
            for step in steps:
                at = [r for r in own if r["step"] == step]
                counts = np.sum([r["spectrum/weight_histogram"] for r in at], axis=0).astype(int)
                # The largest is known exactly, the others by their bins.
                pooled.append([*_spread(counts), max(r["spectrum/weight_max"] for r in at)])
            radii = [r["constraint/radius"] for r in own if math.isfinite(_value(r, "constraint/radius"))]
            bound = min(radii) if radii and optimizer != "adamw" else None
            if not steps:
                continue
            # A ball that no weight comes near would leave no room for them.
            near = bound is not None and bound < 5 * max(map(max, pooled))
            figure = spectrum_history(steps, pooled, bound if near else None, f"{optimizer}: {label}")
            far = "" if near or bound is None else f" c/λ is {bound:.3g}, above the picture."
            caption = f"Singular values of {label} under {optimizer}, all layers pooled, seed 0.{far}"
            place = label.replace("*.", "").replace(".", "_")
            yield Panel(f"instruments_spectrum_{optimizer}_{place}", caption, figure, small=True)


def _any(name: str, columns: set[str], runs: Mapping[str, Records]) -> Iterator[Panel]:
    for column in (c for c in known()[name].columns if not c.endswith("_error")):
        key = f"{name}/{column}"
        if key in columns:
            caption = f"{name}, {column}: {known()[name].columns[column]}; medians over the layers of a kind, seed 0."
            yield Panel(f"instruments_{name}_{column}", caption, by_kind(runs, [Curve(key, column, _median)]))


OWN: dict[str, Callable[[Mapping[str, Records]], Iterator[Panel]]] = {
    "constraint": _constraint,
    "curvature": _curvature,
    "spectrum": _spectrum,
}


def by_kind(
    runs: Mapping[str, Records],
    curves: Sequence[Curve],
    *,
    line: float | None = None,
    floor: float | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Curves over steps, a small picture for each kind of matrix, a colour for each optimizer."""
    wanted = {curve.column for curve in curves}
    kinds = _kinds([r["matrix"] for records in runs.values() for r in records if wanted & r.keys()])
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.6, 2.5 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    palette: dict[str, str] = plots.colours(list(runs))
    dashes: dict[str, Any] = dict(plots.lines(list(runs)))
    for axes, (label, members) in zip(grid.flat, kinds.items(), strict=False):
        for optimizer, records in runs.items():
            for curve in curves:
                own = [r for r in records if r["matrix"] in members and math.isfinite(_value(r, curve.column))]
                steps = sorted({r["step"] for r in own})
                y = [curve.over([_value(r, curve.column) for r in own if r["step"] == step]) for step in steps]
                if logarithmic:
                    y = [value if value > 0 else math.nan for value in y]
                style = curve.style if len(curves) > 1 else dashes[optimizer]
                axes.plot(steps, y, style, color=palette[optimizer], marker="o", markersize=2.5, linewidth=1.3)
        if line is not None:
            axes.axhline(line, color="black", linestyle="--", linewidth=1)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(Plain())
            axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1.2, 0.4)))
        _finish(axes, label, floor)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    # The lowest axes of each column have the numbers of steps, whatever is switched off below them.
    for i, axes in enumerate(grid.flat[: len(kinds)]):
        if i + columns >= len(kinds):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("optimizer steps", fontsize=8)
    for row in grid:
        row[0].set_ylabel(", ".join(curve.label for curve in curves), fontsize=8)
    handles = [Line2D([], [], color=palette[o], linestyle="-" if len(curves) > 1 else dashes[o], label=o) for o in runs]
    if len(curves) > 1:
        handles += [Line2D([], [], color="#555555", linestyle=curve.style, label=curve.label) for curve in curves]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _spread(counts: np.ndarray) -> np.ndarray:
    """Singular values that a histogram may have come from: equally far apart, in the logarithm, in each bin."""
    edges = SPECTRUM.edges("weight").log().numpy()
    return np.exp(
        np.concatenate(
            [low + (np.arange(n) + 0.5) / n * (high - low) for low, high, n in zip(edges, edges[1:], counts, strict=False) if n]
        )
    )


def _kinds(matrices: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in matrices:
        found.setdefault(plots.kind(name), set()).add(name)
    return found


def _with_condition(r: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**r, "condition": _value(r, "curvature/ratio") / _value(r, "curvature/bound")} if "curvature/ratio" in r else r


def _value(r: Mapping[str, Any], column: str) -> float:
    return float(r.get(column, math.nan))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan


def _finish(axes: Axes, title: str, floor: float | None) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if floor is not None:
        axes.set_ylim(bottom=floor)
