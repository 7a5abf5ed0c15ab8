"""Bytes against loss, and the length of averaged polar factors."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from schatten.lab.experiments.error_feedback.verdicts import LENGTHS, lengths
from schatten.lab.ledger import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_UNIT = "Frobenius norm"


def pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    """`bytes` and `polars`, of what there are rows for."""
    final = [row for row in rows if row.get("part") == "bytes" and row.get("phase") == "final" and row.get("curve")]
    lengths_there = lengths(rows, SHOWN_UNIT, "by_workers")
    return {
        **({"bytes": _bytes(final)} if final else {}),
        **({"polars": _polars(rows)} if lengths_there else {}),
    }


def _bytes(rows: Sequence[Row]) -> "Figure":
    from matplotlib.figure import Figure

    from schatten.lab.plots import colours

    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for name, colour in colours(names).items():
        curves = [row["curve"] for row in rows if row["method"] == name]
        # Seeds stop where they reach the target, so a mean goes as far as the first.
        points = np.array([curve[: min(map(len, curves))] for curve in curves], dtype=float).mean(axis=0)
        for axes, sent in zip(panels, (points[:, 2], points[:, 2] + points[:, 3]), strict=True):
            axes.plot(sent, points[:, 1], color=colour, marker="o", markersize=3, label=name)
    for axes, label in zip(panels, ("bytes from workers to the server", "bytes in both directions"), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.axhline(rows[0]["target"], color="#7F7F7F", linestyle="--", linewidth=0.8)
        axes.set_xlabel(label)
        _plain(axes)
    panels[0].set_ylabel("validation loss, nats")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _polars(rows: Sequence[Row]) -> "Figure":
    from matplotlib.figure import Figure

    from schatten.lab.plots import colours

    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("by_workers", "by_noise"), ("workers", "noise"), strict=True):
        curves = lengths(rows, SHOWN_UNIT, key)
        for name, colour in colours(list(curves)).items():
            axes.plot(*zip(*curves[name], strict=True), color=colour, marker="o", markersize=4, label=name)
        for length in LENGTHS:
            axes.axhline(length, color="#7F7F7F", linestyle="--", linewidth=0.8)
        axes.set_xlabel(label)
        _plain(axes)
    panels[1].set_xscale("log")
    noises = [x for x, _ in next(iter(lengths(rows, SHOWN_UNIT, "by_noise").values()))]
    panels[1].set_xticks(noises, [f"{x:g}" for x in noises])
    panels[1].set_xticks([], minor=True)
    panels[0].set_ylabel("length of the mean polar factor")
    panels[0].set_ylim(0, 1.02)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _plain(axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
