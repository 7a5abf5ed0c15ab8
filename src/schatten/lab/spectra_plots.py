"""The pictures of a diagnosed checkpoint: spectra by kind, and numbers against depth; without pyplot's global state."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mode

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from schatten.lab.diagnose_balls import Bound
from schatten.lab.diagnose_changes import Change
from schatten.lab.diagnose_rows import Row
from schatten.lab.matrix_kinds import HIDDEN, depth
from schatten.lab.plots import COLOURS, colours, lines

# Stacks of layers that get a panel, the largest first.
STACKS = 3


def spectra(rows: Sequence[Row], bound: Bound | None) -> Figure | None:
    """Histograms of all singular values of each kind, pooled over layers, with their largest as a line.

    A bound that the weights support is a second line, c / lambda of the kind's commonest c.
    """
    kinds = _by_kind(row for row in rows if row.method in ("svd", "gram") and row.sigma_max > 0)
    if not kinds:
        return None
    columns = min(3, len(kinds))
    panels = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.5 * panels + 0.3), layout="constrained")
    grid = figure.subplots(panels, columns, squeeze=False)
    for axes, (kind, own) in zip(grid.flat, kinds.items(), strict=False):
        values = np.concatenate([row.values.numpy() for row in own])
        top = values.max()
        # Below a thousandth of the largest, a long tail would squeeze everything else.
        shown = values[values > 1e-3 * top]
        axes.hist(shown, np.geomspace(0.95 * shown.min(), 1.05 * top, 40), color=COLOURS[0], alpha=0.75)
        axes.axvline(top, color=COLOURS[1], linestyle="--", linewidth=1, label=f"R = {top:.3g}")
        if bound is not None and bound.supported and kind in HIDDEN:
            line = mode(row.factor(bound.scale) for row in own) / bound.weight_decay
            axes.axvline(line, color=COLOURS[2], linestyle=":", linewidth=1.5, label=f"c/λ = {line:.3g}")
        axes.set_xscale("log")
        if shown.min() < 0.1 * top:
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(_plain)
        axes.tick_params(axis="x", which="both", labelsize=8)
        below = len(values) - len(shown)
        rest = f", {100 * below / len(values):.0f} % below R/1000" if below >= 0.005 * len(values) else ""
        axes.set_title(f"{kind} ({len(own)} matri{'ces' if len(own) > 1 else 'x'}{rest})", fontsize=10)
        axes.set_xlabel("singular value")
        axes.set_ylabel("count")
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    return figure


def _plain(value: float, position: int | None = None) -> str:
    """Few minor ticks are named: those whose first digit is 2 or 5."""
    first = value / 10 ** math.floor(math.log10(value) + 1e-9)
    return f"{value:.2g}" if round(first) in (2, 5) else ""


def sigma_by_depth(rows: Sequence[Row]) -> Figure | None:
    """The largest singular value of hidden matrices against their layer."""
    return _against_depth(_hidden(rows), lambda row: row.sigma_max, "spectral norm")


def stable_rank_by_depth(rows: Sequence[Row]) -> Figure | None:
    """The stable rank of hidden matrices as a share of their smaller side, against their layer."""
    figure = _against_depth(
        _hidden(rows), lambda row: row.stable_rank / min(row.fan_out, row.fan_in), "stable rank / min(m, n)"
    )
    return _in_percent(figure)


def change_by_depth(changes: Sequence[Change]) -> Figure | None:
    """The relative change ||W2 - W1||_F / ||W1||_F of hidden matrices against their layer."""
    hidden = [change for change in changes if change.kind in HIDDEN and math.isfinite(change.relative)]
    return _in_percent(_against_depth(hidden, lambda change: change.relative, "‖W₂ - W₁‖ / ‖W₁‖"))


def _hidden(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.hidden and row.sigma_max > 0]


def _in_percent(figure: Figure | None) -> Figure | None:
    for axes in figure.axes if figure else ():
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append(row)
    order = {kind: i for i, kind in enumerate(HIDDEN)}
    return dict(sorted(kinds.items(), key=lambda item: order.get(item[0], len(order))))


def _against_depth(rows: Sequence[Row] | Sequence[Change], value: Callable[..., float], label: str) -> Figure | None:
    """A line for each kind, the median of its matrices in a layer, shaded from least to largest; a panel for each stack."""
    stacks: dict[str, dict[str, dict[int, list[float]]]] = {}
    for row in rows:
        if (place := depth(row.name)) is not None:
            stack, layer = place
            stacks.setdefault(stack, {}).setdefault(row.kind, {}).setdefault(layer, []).append(value(row))
    # A stack of one layer has no depth.
    deep = {stack: kinds for stack, kinds in stacks.items() if len(_layers(kinds)) > 1}
    largest = sorted(deep, key=lambda stack: -sum(len(v) for layers in deep[stack].values() for v in layers.values()))
    chosen = [stack for stack in stacks if stack in largest[:STACKS]]
    if not chosen:
        return None
    names = [kind for kind in HIDDEN if any(kind in deep[stack] for stack in chosen)]
    palette, dashes = colours(names), lines(names)
    figure = Figure(figsize=(2.2 + 5.0 * len(chosen), 4.0), layout="constrained")
    grid = figure.subplots(1, len(chosen), squeeze=False, sharey=True)
    for axes, stack in zip(grid.flat, chosen, strict=True):
        for i, kind in enumerate(names):
            if kind in deep[stack]:
                # Rings of different sizes show lines that lie on each other.
                _line(axes, deep[stack][kind], kind, palette[kind], dashes[kind], 4 + 0.8 * (len(names) - i))
        axes.set_xlabel(f"layer of {stack}" if stack else "layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    grid[0, 0].set_ylabel(label)
    handles = {text: handle for axes in grid.flat for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([handles[kind] for kind in names], names, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _layers(kinds: Mapping[str, Mapping[int, Sequence[float]]]) -> set[int]:
    return {layer for layers in kinds.values() for layer in layers}


def _line(axes: Axes, layers: Mapping[int, Sequence[float]], kind: str, colour: str, dash: str, ring: float) -> None:
    x = sorted(layers)
    style = {"marker": "o", "markersize": ring, "markerfacecolor": "none"}
    axes.plot(x, [float(np.median(layers[i])) for i in x], dash, color=colour, label=kind, **style)
    if any(len(layers[i]) > 1 for i in x):
        axes.fill_between(x, [min(layers[i]) for i in x], [max(layers[i]) for i in x], color=colour, alpha=0.15, linewidth=0)
