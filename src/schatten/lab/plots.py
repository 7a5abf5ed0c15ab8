"""The pictures of a comparison, drawn from log records and final weights; one function each, without pyplot's global state."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from schatten.lab.compare import Setting

# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")

# More optimizers than colours repeat them in other line styles, and their legend needs a place of its own.
LINES = ("-", "--", ":", "-.")

Records = Sequence[Mapping[str, Any]]


def colours(optimizers: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(optimizers)}


def lines(optimizers: Sequence[str]) -> dict[str, str]:
    return {name: LINES[i // len(COLOURS) % len(LINES)] for i, name in enumerate(optimizers)}


def many(things: Sequence[Any] | Mapping[str, Any]) -> bool:
    return len(things) > len(COLOURS)


def curves_figure(optimizers: Sequence[str] | Mapping[str, Any]) -> Figure:
    return Figure(figsize=(10.4, 7.0) if many(optimizers) else (7.2, 4.4), layout="constrained")


def loss_curves(chosen: Mapping[str, Setting], curves: Mapping[str, Sequence[Records]], axis: str) -> Figure:
    """Loss of each optimizer's best lr against `axis`, "step" or "seconds".

    Validation is a line with a mark at each evaluation, the mean over seeds with their range; training a thin line.
    """
    figure = curves_figure(chosen)
    axes = figure.add_subplot()
    top = []
    dashes = lines(list(chosen))
    for name, colour in colours(list(chosen)).items():
        runs = curves[name]
        evaluations = [[r for r in run if r["event"] == "eval"] for run in runs]
        count = min(map(len, evaluations), default=0)
        if count == 0:
            continue
        x = np.mean([[r[axis] for r in run[:count]] for run in evaluations], axis=0)
        y = np.array([[r["loss"] for r in run[:count]] for run in evaluations])
        style = {"color": colour, "linestyle": dashes[name], "marker": "o", "markersize": 4}
        axes.plot(x, y.mean(axis=0), **style, label=f"{name}, lr {chosen[name].lr:g}")
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        training = [] if many(chosen) else [r for r in runs[0] if r["event"] == "train"]
        axes.plot([r[axis] for r in training], [r["loss"] for r in training], color=colour, alpha=0.35, linewidth=0.8)
        top += y[:, 0].tolist()
    if top:
        # The first steps, near log(vocabulary), would flatten everything that matters.
        axes.set_ylim(top=max(top) * 1.12)
    axes.set_xlabel("optimizer steps" if axis == "step" else "seconds of training, evaluation excluded")
    axes.set_ylabel("loss, nats per token")
    _finish(axes, legend=bool(top), outside=many(chosen))
    return figure


def lr_sensitivity(settings: Sequence[Setting]) -> Figure:
    """Final validation loss against lr: mean and standard deviation over seeds; diverged settings as crosses at the top."""
    names = list(dict.fromkeys(s.optimizer for s in settings))
    figure = curves_figure(names)
    axes = figure.add_subplot()
    dashes = lines(names)
    finite = [s.mean for s in settings if math.isfinite(s.mean)]
    ceiling = max(finite) + 0.1 * (max(finite) - min(finite) or 1.0) if finite else 1.0
    for name, colour in colours(names).items():
        rows = sorted((s for s in settings if s.optimizer == name), key=lambda s: s.lr)
        good = [s for s in rows if math.isfinite(s.mean)]
        spread = [0.0 if math.isnan(s.spread) else s.spread for s in good]
        style = {"color": colour, "linestyle": dashes[name], "marker": "o", "capsize": 3}
        axes.errorbar([s.lr for s in good], [s.mean for s in good], spread, **style, label=name)
        bad = [s.lr for s in rows if not math.isfinite(s.mean)]
        if bad:
            axes.plot(bad, [ceiling] * len(bad), "x", color=colour, markersize=9, label=f"{name}, diverged (inf)")
    axes.set_xscale("log")
    lrs = sorted({s.lr for s in settings})
    if not many(lrs):
        axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
        axes.set_xticks([], minor=True)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss, nats per token")
    _finish(axes, outside=many(names))
    return figure


def step_time(chosen: Mapping[str, Setting], steps: int) -> Figure:
    """Milliseconds of a step at each optimizer's best lr: forward, backward and data, and the optimizer."""
    figure = Figure(figsize=(7.2, 1.2 + 0.5 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    names = list(chosen)
    total = np.array([1e3 * chosen[n].seconds / steps for n in names])
    own = total * [chosen[n].optimizer_share for n in names]
    axes.barh(names, total - own, color="#BBBBBB")
    axes.barh(names, own, left=total - own, color=[colours(names)[n] for n in names])
    for i, (whole, part) in enumerate(zip(total, own, strict=True)):
        axes.text(whole, i, f" {whole:.1f} ms, optimizer {part:.1f} ms", va="center")
    axes.set_xlim(right=1.45 * total.max())
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per step: forward, backward and data in grey, the optimizer in colour")
    _finish(axes, legend=False)
    return figure


def spectra(weights: Mapping[str, Mapping[str, np.ndarray]], bounds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Singular values of the hidden matrices at the end, by kind, pooled over layers, with the line c / lambda.

    `weights`: optimizer -> parameter name -> singular values; `bounds`: optimizer -> parameter name -> c / lambda.
    """
    names = sorted({name for bound in bounds.values() for name in bound} or {n for w in weights.values() for n in w})
    kinds = {kind(name): [n for n in names if kind(n) == kind(name)] for name in names}
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    crowded = many(weights)
    figure = Figure(figsize=(3.4 * columns + (2.0 if crowded else 0), 2.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    palette, dashes = colours(list(weights)), lines(list(weights))
    for axes, (label, members) in zip(grid.flat, kinds.items(), strict=False):
        pooled = {o: np.concatenate([values[n] for n in members if n in values]) for o, values in weights.items()}
        radii = {o: min(bound[n] for n in members) for o, bound in bounds.items() if any(n in bound for n in members)}
        radii = {} if crowded else radii
        everything = np.concatenate([*pooled.values(), np.array(list(radii.values()))])
        positive = everything[everything > 1e-4 * everything.max()]
        bins = np.geomspace(positive.min(), 1.1 * positive.max(), 40)
        for optimizer, values in pooled.items():
            style = {"histtype": "step", "linestyle": dashes[optimizer]} if crowded else {"alpha": 0.55}
            axes.hist(values, bins, color=palette[optimizer], label=optimizer, **style)
        for optimizer, line in radii.items():
            axes.axvline(line, color=palette[optimizer], linestyle="--", label=f"c/λ of {optimizer}: {line:.3g}")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("singular value")
        axes.set_ylabel("count")
        _finish(axes, legend=False)
        if not crowded:
            axes.legend(fontsize=7, framealpha=0.8, edgecolor="none")
    if crowded:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    return figure


def kind(name: str) -> str:
    """A parameter's name without layer numbers: what it is in every block."""
    return re.sub(r"\.\d+\.", ".*.", name).removesuffix(".weight")


def _finish(axes: Axes, legend: bool = True, outside: bool = False) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and outside:
        axes.get_figure().legend(loc="outside right upper", fontsize=8, frameon=False)  # type: ignore[union-attr]
    elif legend:
        axes.legend(frameon=False)
