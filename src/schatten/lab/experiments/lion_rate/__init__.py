"""Does Lion converge at the rate K^(-1/4) if its constants follow sqrt(K), and cycle for ever if they do not?

Claims: (1) With beta1 = 1 - c1/sqrt(K), beta2 = 1 - c2/sqrt(K) and lr = c3 / (sqrt(d) K^(3/4)), the mean over K steps of
E||grad f||_1, or with decay lambda that of the KKT residual ||grad f||_1 + lambda <w, grad f> under |w_i| <= 1/lambda, is
O(sqrt(d) K^(-1/4)) (2411.07724, second-hand). (2) On f = theta^2 / 2 without decay and with constant lr eta, the points

    theta = +-eta/2,   M = -+eta (1 - beta2) / (2 (1 + beta2)),   -+eta/398 with betas (0.9, 0.99)

repeat with period two, so |f'| stays eta/2 for ever, iff (1 - beta1)(1 + beta2) > beta1 (1 - beta2) (derived).

The theorem names no problem. Ours: f = sum a_i (w_i - w*_i)^2 / 2 with d = 100, a geometric from 1 to 0.01, w* from N(0, 1),
w_0 = 0, and noise that is +3 sigma with probability 0.1 and -sigma/3 otherwise, sigma = 1 in every entry: unbiased, but its
sign is not, so only averaging helps Lion. c1 = c2 and c3 are tuned at one K by ten trials and then kept for all K. For
contrast: betas (0.9, 0.99) with the lr tuned at that K by ten trials, constant or falling with K^(-3/4).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, Verdict, option
from schatten.lab.experiments.lion_rate.rate import (
    CONSTANTS,
    CONTRASTS,
    EXPONENT,
    LRS,
    SCHEDULE,
    Stochastic,
    check_contrast,
    check_rate,
    descend,
    of_way,
)
from schatten.lab.experiments.lion_rate.two_cycle import BETAS, CYCLE_LRS, PAIRS, check_cycles, cycle, stall
from schatten.lab.ledger import Ledger, Row
from schatten.lab.plots import COLOURS
from schatten.lab.statistics import mean
from schatten.schedules import lion_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TUNING_SEED = 1000


@dataclass(frozen=True)
class Config:
    """The full run has more seeds and sixteen times the steps."""

    seeds: int = 5
    dimension: int = option(100, "Entries of w.")
    noise: float = option(1.0, "Standard deviation of an entry's gradient noise.")
    decay: float = option(1.0, "Weight decay of the constrained run: |w_i| <= 1/decay.")
    steps: tuple[int, ...] = option((150, 300, 600, 1200, 2400, 4800, 9600), "K, the lengths of the runs.")
    cycle_steps: int = option(400, "Steps of the two-cycle.")
    tuning_steps: int = option(300, "The K at which the constants are tuned.")


def run(config: Config, ledger: Ledger) -> None:
    """Cycles, the constants, then each K."""
    if config.decay <= 0:
        raise InputError(
            f"--decay must be positive, the bound 1/decay needs one, got {config.decay:g}: without decay runs anyway."
        )
    for betas, lr in itertools.product(PAIRS, CYCLE_LRS):
        case = {"phase": "cycle", "betas": betas, "lr": lr, "steps": config.cycle_steps}
        ledger.measure(case, lambda betas=betas, lr=lr: cycle(betas, lr, config.cycle_steps))
    for lr in CYCLE_LRS:
        case = {"phase": "stall", "betas": BETAS, "lr": lr, "steps": config.cycle_steps}
        ledger.measure(case, lambda lr=lr: stall(BETAS, lr, config.cycle_steps))

    seeds = tuple(range(config.seeds))

    def measure(
        phase: str, way: str, steps: int, lr: float, betas: tuple[float, float], decay: float, of: Sequence[int]
    ) -> Row:
        case = {"phase": phase, "way": way, "steps": steps, "lr": lr, "betas": betas, "decay": decay, "seeds": list(of)}
        drawn = config.dimension, config.noise, of
        return ledger.measure(case, lambda: descend(Stochastic.draw(*drawn), steps, lr, betas, decay))

    def rate(steps: int, c: float, c3: float) -> tuple[float, tuple[float, float]]:
        return lion_rate(steps, config.dimension, min(c, math.sqrt(steps)), min(c, math.sqrt(steps)), c3)

    at = config.tuning_steps
    for decay in (0.0, config.decay):
        trials = {
            (c, c3): measure("tune", SCHEDULE, at, *rate(at, c, c3), decay, [TUNING_SEED])["kkt"][0] for c, c3 in CONSTANTS
        }
        c, c3 = min(trials, key=trials.__getitem__)
        for steps in config.steps:
            measure("rate", SCHEDULE, steps, *rate(steps, c, c3), decay, seeds)
    flat = {lr: measure("tune", "constant betas", at, lr, BETAS, 0.0, [TUNING_SEED])["kkt"][0] for lr in LRS}
    best = min(flat, key=flat.__getitem__)
    # Every other K is enough to see what they do.
    for (way, power), steps in itertools.product(CONTRASTS.items(), sorted(config.steps)[::-2]):
        measure("rate", way, steps, best * (at / steps) ** power, BETAS, 0.0, seeds)


def check(rows: Sequence[Row]) -> list[Verdict]:
    return [*check_cycles(rows), *check_rate(rows), *check_contrast(rows)]


def pictures(rows: Sequence[Row]) -> "dict[str, Figure]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, decay, label in zip(panels, (False, True), ("mean $||\\nabla f||_1$", "mean KKT residual"), strict=True):
        for way, colour in zip((SCHEDULE, *CONTRASTS), COLOURS, strict=False):
            if of := of_way(rows, way, decay):
                x, y = [row["steps"] for row in of], [mean(row["kkt"]) for row in of]
                axes.plot(x, y, color=colour, marker="o", markersize=4, label=way)
                axes.fill_between(x, [min(r["kkt"]) for r in of], [max(r["kkt"]) for r in of], color=colour, alpha=0.2, lw=0)
                if way == SCHEDULE:
                    axes.plot(x, [y[0] * (k / x[0]) ** EXPONENT for k in x], "--", color="#555555", label="$K^{-1/4}$")
        axes.set_title(f"{'with' if decay else 'without'} decay")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("K, steps of the run")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return {"rate": figure}


CAPTIONS = {
    "rate": "Mean residual over a run of Lion against its length K: means over seeds, bands their range; every way was "
    "tuned by ten trials at one K."
}

EXPERIMENT = Experiment(
    "arXiv 2411.07724",
    Config(),
    Config(seeds=10, steps=tuple(150 * 2**k for k in range(11))),
    run,
    check,
    pictures,
    CAPTIONS,
    "the dependence on d, and non-convex losses, which the theorem covers too.",
)
