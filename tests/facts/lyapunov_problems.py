"""Random smooth problems, stepped by the library's own optimizers, and what V_K leaves of its bound at each step.

Not a test file: `facts` and `planted` import it. A problem is an objective with a known Lipschitz constant of its gradient,
a shape, a map, betas, lr, decay, factor, a start in the domain of K* and a momentum to start with. Four problems, one of each
kind of objective, share all but the objective, the start and the momentum, and are stepped as one parameter of four matrices.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import schatten
from schatten import maps
from schatten.diagnostics.lyapunov import lyapunov, lyapunov_change_bound

SVD = schatten.solvers.svd()

# Both sides of the inequality are sums of some ten numbers of fp64, each off by at most 1e-14 of the largest.
ROUNDING = 1e-11

STEPS = 20

MAPS: dict[str, Callable[[], maps.Map]] = {
    "nuclear": lambda: maps.Nuclear(SVD),
    "huber": lambda: maps.Huber(0.3, solver=SVD),
    "half power": lambda: maps.Power(0.5, solver=SVD),
    "squared Frobenius": lambda: maps.Power(1.0, solver=SVD),
    "Frobenius": maps.Frobenius,
    "l1": maps.L1,
    "rows": lambda: maps.L1(over="rows"),
    "Ky Fan": lambda: maps.KyFan(2, solver=SVD),
    "Schatten 4": lambda: maps.Schatten(4.0, solver=SVD),
    "log cosh": lambda: maps.LogCosh(0.5, solver=SVD),
    "pseudo-Huber": lambda: maps.PseudoHuber(0.5, solver=SVD),
    "log barrier": lambda: maps.LogSmoothed(0.5, solver=SVD),
    "soft threshold": lambda: maps.SoftThreshold(0.2, solver=SVD),
    "hard gate": lambda: maps.HardGate(0.2, solver=SVD),
    "clip": lambda: maps.Clip(0.7, solver=SVD),
    "half nuclear squared": lambda: maps.HalfNuclearSquared(solver=SVD),
    "twice huber": lambda: 2.0 * maps.Huber(0.3, solver=SVD),
}


class Four(NamedTuple):
    """Four problems: `loss` takes (4, m, n) to (4), `smoothness` is (4), `start` and `momentum` are (4, m, n)."""

    name: str
    map: maps.Map
    loss: Callable[[Tensor], Tensor]
    smoothness: Tensor
    start: Tensor
    momentum: Tensor
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    scale: str
    decay: str


def quadratic(start, normal) -> tuple[Callable[[Tensor], Tensor], float]:
    """||P (X - A) Q||^2 / 2."""
    m, n = start.shape
    P, Q, A = normal(m, m) / math.sqrt(m), normal(n, n) / math.sqrt(n), 3 * normal(m, n)
    L = (torch.linalg.matrix_norm(P, ord=2) * torch.linalg.matrix_norm(Q, ord=2)).square().item()
    return lambda X: (P @ (X - A) @ Q).square().sum() / 2, L


def logistic(start, normal) -> tuple[Callable[[Tensor], Tensor], float]:
    """The mean of log(1 + exp(-<A_i, X>)), whose Hessian is at most sum of a_i a_i^T / 4k."""
    A = normal(12, *start.shape)
    L = torch.linalg.matrix_norm(A.flatten(1), ord=2).square().item() / 48
    return lambda X: nn.functional.softplus(-(A * X).sum((-2, -1))).mean(), L


def waves(start, normal) -> tuple[Callable[[Tensor], Tensor], float]:
    """sum of a_ij cos(X_ij - b_ij), not convex."""
    a, b = normal(*start.shape), normal(*start.shape)
    return lambda X: (a * torch.cos(X - b)).sum(), a.abs().max().item()


def bowl(start, normal) -> tuple[Callable[[Tensor], Tensor], float]:
    """50 ||X - A||^2 with A close to the start: as curved in every direction as L says, so that the curvature term is tight."""
    A = start + 0.01 * normal(*start.shape)
    return lambda X: 50 * (X - A).square().sum(), 100.0


OBJECTIVES = (quadratic, logistic, waves, bowl)


def inside(K: maps.Map, W: Tensor, weight_decay: float, factor: float, share: float) -> Tensor:
    """The multiple of W that is `share` of the way to where K* becomes infinite, or of the length of W where it never does."""
    if torch.isfinite(K.conjugate(1e9 * W)):
        return share * W
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if K.violation(middle * weight_decay / factor * W) == 0 else (low, middle)
    return share * low * W


def problems(fours: int, seed: int = 0) -> Iterator[Four]:
    """`fours` times four problems, the maps and forms of decay in turn, the rest by chance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    for i in range(fours):
        name = list(MAPS)[i % len(MAPS)]
        K, shape = MAPS[name](), (int(uniform(2, 8)), int(uniform(2, 8)))
        beta2 = uniform(0.0, 0.99)
        # One in eight with equal betas, one with beta1 = 0.
        beta1 = beta2 if i % 8 == 3 else 0.0 if i % 8 == 5 else uniform(0.0, beta2)
        lr, weight_decay = 10 ** uniform(-3, -0.3), 10 ** uniform(-1.3, 0.3)
        scale = ("none", "keller", "adamw-rms")[int(uniform(0, 3))]
        factor = schatten.scales.Scale(scale).factor(*shape)
        starts = [inside(K, normal(*shape), weight_decay, factor, share=0.999 * uniform(0.0, 1.0) ** 0.3) for _ in OBJECTIVES]
        momentum = torch.stack([10 ** uniform(-2, 1) * normal(*shape) for _ in OBJECTIVES])
        losses, smoothness = zip(*(make(start, normal) for make, start in zip(OBJECTIVES, starts, strict=True)), strict=True)

        def loss(X: Tensor, losses=losses) -> Tensor:
            return torch.stack([of(x) for of, x in zip(losses, X, strict=True)])

        L, decay = torch.tensor(smoothness, dtype=torch.float64), ("implicit", "explicit")[i % 2]
        yield Four(name, K, loss, L, torch.stack(starts), momentum, lr, weight_decay, (beta1, beta2), scale, decay)


def slacks(four: Four, value=lyapunov, bound=lyapunov_change_bound, decay: str | None = None) -> list[float]:
    """What the bound leaves of each step of `schatten.LionK`, relative to the size of V_K; negative where it is violated.

    `decay` is what the optimizer does, if not what the problem says.
    """
    numbers = (four.lr, four.weight_decay, four.betas, schatten.scales.Scale(four.scale).factor(*four.start.shape[-2:]))
    p = nn.Parameter(four.start.clone())
    opt = schatten.LionK(
        [p],
        four.map,
        lr=four.lr,
        weight_decay=four.weight_decay,
        betas=four.betas,
        scale=four.scale,
        decay=decay or four.decay,
        layout="experts",
    )
    opt.state[p]["momentum_buffer"].copy_(four.momentum)
    found = []
    before = None
    for _ in range(STEPS + 1):
        W, M = p.detach().clone(), opt.state[p]["momentum_buffer"].clone()
        F = four.loss(p)
        (p.grad,) = torch.autograd.grad(F.sum(), p)
        V = value(four.map, W, M, F.detach(), *numbers, decay=four.decay)
        if before is not None:
            V_old, allowed = before
            size = 1 + torch.maximum(V_old.abs(), V.abs())
            found += ((allowed - (V - V_old)) / size).tolist()
        before = V, bound(four.map, W, M, p.grad, four.smoothness, *numbers, decay=four.decay).total
        opt.step()
    return found
