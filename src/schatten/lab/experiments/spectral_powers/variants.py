"""The optimizers U S^p V^T with the paper's choice of parameters, their learning rates, and what is read off a run."""

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

import schatten
from schatten.lab.experiments.spectral_powers.published import ADAM, LOSSES, MSGD
from schatten.lab.fit import Fit
from schatten.powers import power_lr
from schatten.solvers import coupled_newton, newton_schulz

PRESETS = {MSGD: schatten.SpectralSGD, ADAM: schatten.SpectralAdam}

# Of vectors, in both families; AdamQ's released configuration alone has 6e-4.
VECTOR_LR = 3e-4
BETAS = (0.9, 0.95)

# Where the grids of a small model are centred: its best lr's are not those of 124M parameters. Read off a sweep of decades
# on seed 2000, which takes no part here.
CENTRES = {
    MSGD: ((0.0, 0.06), (0.25, 0.13), (0.5, 0.13), (1.0, 0.13)),
    ADAM: ((0.0, 0.08), (0.25, 0.1), (0.5, 0.04), (1.0, 0.012)),
}


def build(model: nn.Module, family: str, p: float, lr: float, released: bool) -> torch.optim.Optimizer:
    """Everything with two dimensions or more is a matrix, embeddings and the tied head included; vectors get AdamW.

    `released`: the paper's own iterations where it has one, 15 quintics in bf16 and the coupled iteration.
    """
    solvers: dict[float, Any] = {}
    if released:
        solvers = {0.0: newton_schulz(steps=15, dtype="bfloat16"), 0.25: coupled_newton(), 0.5: coupled_newton()}
    rules = [(entry.name, "spectral") for entry in schatten.plan(model) if len(entry.shape) >= 2]
    vectors = {"lr": VECTOR_LR, "betas": BETAS, "weight_decay": 0.0}
    own = {"momentum": 0.9} if family == MSGD else {"betas": BETAS}
    return PRESETS[family](model, p, lr, 0.0, solver=solvers.get(p), rules=rules, adamw=vectors, **own)


def grid(family: str, p: float, count: int, factor: float, published: bool) -> list[float]:
    """The published lr's of one of the eight, or `count` of them, `factor` apart, about its centre, two digits each."""
    if published:
        return list(LOSSES[family, p])
    centre = dict(CENTRES[family])[p]
    return [float(f"{centre * factor ** (k - (count - 1) / 2):.2g}") for k in range(count)]


def between(p: float, best: Mapping[float, float]) -> float:
    """The lr of a power that is not tuned: geometric interpolation of its neighbours' best, as the presets' default is."""
    return float(f"{power_lr(p, None, sorted(best.items())):.2g}")


def score(found: Fit, vocabulary: int) -> float:
    """The lowest validation loss; inf of a run that is not finite or has not fallen below a uniform guess: it diverged."""
    return found.best if not found.diverged and found.loss < math.log(vocabulary) else math.inf


def spike(losses: list[float], window: int = 5) -> float:
    """How far the mean training loss of `window` steps rose above its lowest earlier value; inf if it is not finite."""
    if not all(map(math.isfinite, losses)):
        return math.inf
    smooth = [sum(losses[k : k + window]) / window for k in range(len(losses) - window + 1)]
    return max((now - lowest for now, lowest in zip(smooth, accumulate(smooth, min), strict=True)), default=0.0)


def width(losses: dict[float, float], bound: float) -> tuple[float, bool]:
    """The factor between the ends of the lr's about the best whose loss is at most `bound`; 1 if the best is above it.

    Losses are interpolated in log lr; the flag says that the range ends with the grid, so that it may be wider.
    """
    lrs = sorted(losses)
    best = min(range(len(lrs)), key=lambda k: losses[lrs[k]])
    if not math.isfinite(bound) or losses[lrs[best]] > bound:
        return 1.0, False
    low, low_open = _edge(lrs[best::-1], losses, bound)
    high, high_open = _edge(lrs[best:], losses, bound)
    return high / low, low_open or high_open


def _edge(lrs: list[float], losses: dict[float, float], bound: float) -> tuple[float, bool]:
    for inner, outer in pairwise(lrs):
        if losses[outer] > bound:
            share = (bound - losses[inner]) / (losses[outer] - losses[inner])
            return inner * (outer / inner) ** share, False
    return lrs[-1], True
