"""Pictures: trajectories of the toy, and the networks' singular values against the ball."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from schatten.lab.experiments.spectral_ball import toy
from schatten.lab.experiments.spectral_ball.comparison import WORDS, groups
from schatten.lab.experiments.spectral_ball.networks import PARTS
from schatten.lab.instrument_plots import Trajectory, ball_trajectories
from schatten.lab.ledger import Row
from schatten.lab.plots import COLOURS

CAPTIONS = {
    "toy": "Two singular values under Muon, from three starts each: inside, outside and entering the ball of radius 1/lambda.",
    "networks": "Above: the largest singular value of all hidden matrices times lambda, dotted at 1, dashed at "
    "1.16, where the default polynomial's directions may carry it. Below: singular values of the ResNet at three steps, and "
    "of the GPT's W_Q, W_K and W_V at the end under Muon and AdamW.",
}

NAMES = {"exact": "exact", "polynomial": "polynomial", "keller": "Keller"}


def pictures(rows: Sequence[Row]) -> Mapping[str, Figure]:
    """At most two: what rows there are."""
    found = {}
    panels = {}
    for case in toy.CASES:
        own = [row for row in rows if row["part"] == "toy" and row["case"] == case.name]
        if own:
            runs = {
                f"seed {row['seed']}": Trajectory([(a, b) for a, b in row["sigma"]], case.radius, case.optimum) for row in own
            }
            panels[f"λ = {case.decay:g}, {WORDS[case.name]}"] = runs
    if panels:
        found["toy"] = ball_trajectories(panels)
    if any(row["part"] == "network" for row in rows):
        found["networks"] = _networks(rows)
    return found


def _networks(rows: Sequence[Row]) -> Figure:
    trained = [row for row in rows if row["part"] == "network"]
    names = list(dict.fromkeys(row["network"] for row in trained))
    figure = Figure(figsize=(12.0, 6.4), layout="constrained")
    upper, lower = np.array(figure.subfigures(2, 1)).flat
    for axes, name in zip(upper.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        _ratios(axes, name, [row for row in trained if row["network"] == name])
    left, right = lower.subplots(1, 2)
    _histograms(left, _resnet(trained), "ResNet, exact directions, λ = 2", 0.5)
    _histograms(right, _attention(rows), "GPT, W_Q, W_K and W_V at the end", None)
    return figure


def _ratios(axes: Axes, name: str, rows: Sequence[Row]) -> None:
    for (solver, decay), colour in zip(dict.fromkeys((r["solver"], r["decay"]) for r in rows), COLOURS, strict=False):
        own = [row for row in rows if (row["solver"], row["decay"]) == (solver, decay)]
        for i, row in enumerate(own):
            label = f"{NAMES[solver]}, λ = {decay:g}" if i == 0 else None
            axes.plot(row["step"], row["ratio"], color=colour, linewidth=1.0, alpha=0.8, label=label)
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.axhline(1.16, color="black", linestyle="--", linewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_yticks([0.5, 1, 2, 5, 10])
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("largest ||W||_op λ")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _resnet(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    own = groups(rows).get(("resnet", "exact", 2.0), [])
    steps = sorted(map(int, own[0]["spectra"])) if own else []
    return {f"step {t}": np.concatenate([row["spectra"][str(t)] for row in own if str(t) in row["spectra"]]) for t in steps}


def _attention(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    runs: dict[str, list[float]] = {}
    for row in rows:
        if row["part"] == "adamw" or (row["part"] == "network" and (row["network"], row["solver"]) == ("gpt", "polynomial")):
            label = f"AdamW, lr {row['lr']:g}" if row["part"] == "adamw" else f"Muon, λ = {row['decay']:g}"
            runs.setdefault(label, []).extend(s for part in PARTS for s in row["attention"].get(part, ()))
    return {label: np.array(values) for label, values in runs.items() if values}


def _histograms(axes: Axes, values: Mapping[str, np.ndarray], title: str, line: float | None) -> None:
    if not values:
        axes.set_axis_off()
        return
    bins = np.linspace(0, 1.02 * max(v.max() for v in values.values()), 60).tolist()
    for (label, own), colour in zip(values.items(), COLOURS, strict=False):
        axes.hist(own, bins, histtype="step", color=colour, label=label, linewidth=1.4, weights=np.full(len(own), 1 / len(own)))
    if line is not None:
        axes.axvline(line, color="black", linestyle=":", linewidth=1, label=f"1/λ = {line:g}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("singular value")
    axes.set_ylabel("share")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
