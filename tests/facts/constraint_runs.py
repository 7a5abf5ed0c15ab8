"""Runs of Muon's map from outside its ball under gradients of every kind, and V_B after each step.

Not a test file: `facts` and `planted` import it.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

import schatten
from schatten.diagnostics.constraint import ball_violation
from schatten.maps import Nuclear

SHAPE, STEPS, DECAY = (6, 4), 200, 0.8

FACTOR = schatten.scales.Scale("keller").factor(*SHAPE)

# The spectral norm of the start, ten times the radius.
START = 10 * FACTOR / DECAY

LRS: dict[str, Callable[[], list[float]]] = {
    "constant": lambda: [0.05] * STEPS,
    "warm-up and decay": lambda: [0.1 * min(t / 20, 1 - t / (STEPS + 1)) for t in range(STEPS)],
}


def _sparse(W: Tensor, generator: torch.Generator) -> Tensor:
    G = torch.zeros_like(W)
    G[int(torch.randint(6, (), generator=generator)), int(torch.randint(4, (), generator=generator))] = 1.0
    return G


GRADIENTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "outward": lambda W, generator: -W,
    "zero": lambda W, generator: torch.zeros_like(W),
    "inward": lambda W, generator: W,
    "random": lambda W, generator: torch.randn(SHAPE, generator=generator, dtype=torch.float64),
    # Cauchy entries, some of them 1e4 times the median.
    "heavy-tailed": lambda W, generator: torch.randn(SHAPE, generator=generator, dtype=torch.float64).reciprocal(),
    "of a far optimum": lambda W, generator: W - 1e3,
    "tiny": lambda W, generator: -1e-30 * W,
    "sparse": _sparse,
}


def kept(lr: float, decay: str) -> float:
    """The share of V_B that a step leaves at most."""
    return 1 - lr * DECAY if decay == "explicit" else 1 / (1 + lr * DECAY)


@cache
def run(gradients: str, lrs: str, decay: str, scale: str = "keller") -> list[float]:
    """V_B before the first step and after each, of steps by the library with the gradient itself as its signal."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    p = nn.Parameter(W * START / torch.linalg.matrix_norm(W, ord=2))
    K = Nuclear(schatten.solvers.svd())
    opt = schatten.LionK([p], K, weight_decay=DECAY, betas=(0.0, 0.0), scale=scale, decay=decay)
    violations = [ball_violation(p.detach(), DECAY, FACTOR).item()]
    for lr in LRS[lrs]():
        opt.param_groups[0]["lr"] = lr
        p.grad = GRADIENTS[gradients](p.detach(), generator)
        opt.step()
        violations.append(ball_violation(p.detach(), DECAY, FACTOR).item())
    return violations
