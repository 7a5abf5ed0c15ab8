"""How residual and gap of composite Muon fall with the number of steps T, with lr and average fixed by T as in the theorems.

    smooth       alpha = T^-1/2, lr = D T^-3/4:       mean over steps of ||grad (F + R)||_* = O(T^-1/4), the O(eps^-4)
    star-convex  alpha = T^-2/3, lr = D log(T) / T:   F + R above its minimum at the end = O~(T^-1/3), the O(eps^-3)

The orders are published; these schedules, derived here, balance the error terms of the proofs: D (1 - lr/D)^T for the way,
sqrt(alpha) sigma and L lr / alpha for what the average lags behind.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import schatten
from schatten.lab.experiments.trust_region.problems import DECAY, NOISE, NOISE_SEEDS, Problem

# The distance D from the start to the optimum in the spectral norm: its singular values lie below 1.5.
DISTANCE = 1.5


@dataclass(frozen=True)
class Theorem:
    """alpha = T^-average, the exponent of the bound on `quantity` (`what` it is), and its order in eps."""

    name: str
    average: float
    bound: float
    quantity: str
    what: str
    order: str

    def lr(self, steps: int) -> float:
        return DISTANCE * steps**-0.75 if self.name == "smooth" else DISTANCE * math.log(steps) / steps


THEOREMS = (
    Theorem("smooth", 1 / 2, 1 / 4, "residual", "mean residual", "O(eps^-4)"),
    Theorem("star-convex", 2 / 3, 1 / 3, "gap", "last gap", "O(eps^-3)"),
)


def residual(problem: Problem, W: Tensor) -> Tensor:
    """||grad F + decay W||_*, the dual norm of the spectral ball, mean over copies."""
    return torch.linalg.matrix_norm(problem.gradient(W) + DECAY * W, "nuc").mean()


def measure(theorem: Theorem, problem: Problem, steps: int, copies: int, seed: int) -> dict[str, float]:
    """The mean residual of all steps and the last gap, both averaged over `copies` runs of one problem (kind `l2`)."""
    generator = torch.Generator().manual_seed(NOISE_SEEDS + seed)
    W = nn.Parameter(torch.zeros(copies, *problem.C.shape, dtype=problem.C.dtype))
    optimizer = schatten.TrustRegion(
        [W], lr=theorem.lr(steps), weight_decay=DECAY, momentum=1 - steps**-theorem.average, scale="none", layout="experts"
    )
    total = 0.0
    for t in range(steps):
        W.grad = problem.gradient(W.detach()) + NOISE * torch.randn(W.shape, generator=generator, dtype=W.dtype)
        if t == 0:
            optimizer.state[W]["momentum_buffer"].copy_(W.grad)
        total += float(residual(problem, W.detach()))
        optimizer.step()
    gaps = [problem.gap(copy) for copy in W.detach()]
    return {"residual": total / steps, "gap": sum(gaps) / copies}
