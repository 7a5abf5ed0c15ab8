"""Does composite Muon, the trust-region step with a penalty, reach the regularised optimum, and at the promised rate?

    M <- (1 - alpha) M + alpha G,   W <- argmin over ||X - W||_op <= lr of <M, X> + R(X)

Kovalev (arXiv 2503.12645) proves O(eps^-4) stochastic gradients for a smooth F, O(eps^-3) for a star-convex one, and shows no
experiments; nothing published can be compared but these orders, which are bounds from above. Measured here:

penalties   noisy least squares with a known optimum of F + R, R = (decay/2) ||W||_F^2 or a multiple of the nuclear norm:
            the gap against steps of composite Muon, of the same step with a Euclidean ball, of proximal and projected
            gradients with the same momentum, and of Muon with decoupled decay, which solves another problem.
ball        the constraint ||W||_op <= radius, as decoupled decay 1/radius has it, against projections: gap and violation.
rates       exponents in the number of steps T, with lr and alpha fixed by T as the proofs balance them.

All settings are ours. Every method has the same grid of lr, chosen by its gap on problem and noise of a seed apart; the lr
falls to zero along a cosine.
"""

import math
from dataclasses import dataclass

from schatten.lab.contest import TUNING_SEED
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.trust_region.methods import METHODS, descend
from schatten.lab.experiments.trust_region.pictures import CAPTIONS, pictures
from schatten.lab.experiments.trust_region.problems import Problem
from schatten.lab.experiments.trust_region.rates import THEOREMS, measure
from schatten.lab.experiments.trust_region.verdicts import check
from schatten.lab.ledger import Ledger, Row


@dataclass(frozen=True)
class Config:
    """There is no published size: `full` has longer runs and more seeds."""

    seeds: int = 5
    steps: int = option(200, "Steps to the optimum of a penalty or constraint.")
    lrs: tuple[float, ...] = option((0.01, 0.03, 0.1, 0.3, 1.0), "Learning rates tried for every method.")
    horizons: tuple[int, ...] = option((256, 512, 1024, 2048), "Numbers of steps T of the rates.")
    copies: int = option(8, "Independent runs that are averaged for a seed of the rates.")

    def __post_init__(self) -> None:
        if min(self.steps, self.copies, len(self.lrs), *self.horizons, *map(math.ceil, self.lrs)) < 1:
            raise InputError(
                f"--steps, --copies, --lrs and --horizons must be positive and --lrs name one at least, got {self.steps}, "
                f"{self.copies}, {self.lrs} and {self.horizons}."
            )


def run(config: Config, ledger: Ledger) -> None:
    """Every method of every problem, then the rates."""
    for kind, methods in METHODS.items():
        for method in methods:

            def measured(lr: float, seed: int, phase: str, kind: str = kind, method=method) -> Row:
                case = {"part": kind, "phase": phase, "method": method.name, "lr": lr, "seed": seed}
                return ledger.measure(case, lambda: descend(method, Problem.draw(kind, seed), lr, config.steps, seed))

            tried = {lr: _score(measured(lr, TUNING_SEED, "tune")) for lr in config.lrs}
            best = min(tried, key=lambda lr: tried[lr])
            for seed in range(config.seeds):
                measured(best, seed, "final")
    for theorem in THEOREMS:
        for seed in range(config.seeds):
            for steps in config.horizons:
                case = {"part": "rates", "theorem": theorem.name, "steps": steps, "seed": seed}

                def compute(theorem=theorem, steps: int = steps, seed: int = seed) -> dict[str, float]:
                    return measure(theorem, Problem.draw("l2", seed), steps, config.copies, seed)

                ledger.measure(case, compute)


def _score(row: Row) -> float:
    """The gap; outside the ball F may lie below the constrained minimum, so that the violation counts as well."""
    return abs(row["gap"]) + row["outside"][-1]


EXPERIMENT = Experiment(
    "arXiv 2503.12645",
    Config(),
    Config(seeds=10, steps=2000, lrs=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), horizons=(1024, 2048, 4096, 8192, 16384, 32768)),
    run,
    check,
    pictures,
    CAPTIONS,
    lacks="the extrapolated gradient with its O(eps^-3.5), and a constraint inside the composite step, whose R is a norm.",
)
