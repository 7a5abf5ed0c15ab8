"""Composite Muon and its baselines, each by a rule of the library on gradients of F with noise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import schatten
from schatten.lab.experiments.trust_region.problems import (
    DECAY,
    NOISE,
    NOISE_SEEDS,
    PENALTY,
    RADIUS,
    Problem,
    projected,
    proximal,
)
from schatten.lab.schedule import lr_factor
from schatten.maps import Frobenius, Nuclear, Power
from schatten.retractions import DecoupledDecay
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum

# M <- (1 - alpha) M + alpha G of the theorem, which is momentum 1 - alpha here.
ALPHA = 0.1

Make = Callable[[nn.Parameter, Problem], torch.optim.Optimizer]
After = Callable[[Problem, Tensor, float], Tensor]


@dataclass(frozen=True)
class Method:
    """An optimizer of F, or of F + R; `after` is what follows its step (a projection, a proximal map), with the step's lr."""

    name: str
    make: Make
    after: After | None = None


def _trust(W: nn.Parameter, problem: Problem, norm: schatten.maps.Map) -> torch.optim.Optimizer:
    decay = DECAY if problem.kind == "l2" else 0.0
    penalty = PENALTY * Nuclear() if problem.kind == "nuclear" else None
    return schatten.TrustRegion([W], lr=1.0, weight_decay=decay, momentum=1 - ALPHA, norm=norm, penalty=penalty, scale="none")


def _momentum(W: nn.Parameter, problem: Problem) -> torch.optim.Optimizer:
    rule = Rule(Momentum(nesterov=False), Power(1.0, over="entries"), Scale("none"), DecoupledDecay())
    return schatten.SpectralOptimizer([W], rule, lr=1.0, weight_decay=0.0, momentum=1 - ALPHA)


def _muon(W: nn.Parameter, decay: float) -> torch.optim.Optimizer:
    svd = schatten.solvers.svd()
    return schatten.Muon([W], lr=1.0, weight_decay=decay, momentum=1 - ALPHA, nesterov=False, scale="none", solver=svd)


def _decayed(W: nn.Parameter, problem: Problem) -> torch.optim.Optimizer:
    """Decoupled decay: of `ball` the reciprocal radius, else that of the penalty, whose problem it does not solve."""
    return _muon(W, 1 / RADIUS if problem.kind == "ball" else DECAY)


COMPOSITE = Method("composite Muon", lambda W, problem: _trust(W, problem, Nuclear()))
EUCLIDEAN = Method("composite, Euclidean", lambda W, problem: _trust(W, problem, Frobenius()))
PROXIMAL = Method("proximal", _momentum, lambda problem, W, lr: proximal(problem.kind, W, lr))
PROJECTED = Method("projected", _momentum, lambda problem, W, lr: projected(problem.kind, W, problem.size))
MUON = Method("Muon, decoupled decay", _decayed)
MUON_PROJECTED = Method("Muon, projected", lambda W, problem: _muon(W, 0.0), PROJECTED.after)


# A ball's indicator is no multiple of a norm, so the composite step cannot have it: there decoupled decay is the constraint.
METHODS = {
    "l2": (COMPOSITE, EUCLIDEAN, PROXIMAL, PROJECTED, MUON),
    "nuclear": (COMPOSITE, PROXIMAL, PROJECTED, MUON),
    "ball": (MUON, MUON_PROJECTED, PROJECTED),
}


def descend(method: Method, problem: Problem, lr: float, steps: int, seed: int, points: int = 24) -> dict[str, object]:
    """Gap and violation along `steps` steps whose lr falls to zero along a cosine, on noise of `seed`.

    `rank` counts singular values of the last weights above a thousandth of the largest.
    """
    generator = torch.Generator().manual_seed(NOISE_SEEDS + seed)
    W = nn.Parameter(torch.zeros_like(problem.C))
    optimizer = method.make(W, problem)
    (group,) = optimizer.param_groups
    at = sorted({round(steps ** (k / (points - 1))) for k in range(points)})
    found: dict[str, list[float]] = {
        "steps": [0.0],
        "gaps": [problem.gap(W.detach())],
        "outside": [problem.outside(W.detach())],
    }
    for t in range(1, steps + 1):
        W.grad = problem.gradient(W.detach()) + NOISE * torch.randn(W.shape, generator=generator, dtype=W.dtype)
        if t == 1:
            # The theorem's average starts at the first gradient, the library's at zero.
            optimizer.state[W]["momentum_buffer"].copy_(W.grad)
        group["lr"] = lr * lr_factor("cosine", t - 1, steps)
        optimizer.step()
        if method.after is not None:
            with torch.no_grad():
                W.copy_(method.after(problem, W.detach(), group["lr"]))
        if t in at:
            found["steps"].append(float(t))
            found["gaps"].append(problem.gap(W.detach()))
            found["outside"].append(problem.outside(W.detach()))
    s = torch.linalg.svdvals(W.detach())
    distance = float(torch.linalg.matrix_norm(W.detach() - problem.optimum))
    return {**found, "gap": found["gaps"][-1], "distance": distance, "rank": int((s > 1e-3 * s[0]).sum())}
