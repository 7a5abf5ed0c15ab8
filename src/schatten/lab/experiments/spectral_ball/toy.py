"""Two singular values against the ball: the toy of figures 1 to 3."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import schatten
from schatten.diagnostics.constraint import ball_violation
from schatten.diagnostics.lyapunov import lyapunov, lyapunov_change_bound

LR = 2e-3
BETAS = (0.9, 0.99)

A = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
# A's largest eigenvalue: the gradient of F is Lipschitz with it.
SMOOTHNESS = 1.6

# Growth below this share of the largest value is rounding of fp64.
ROUNDING = 1e-12

# Steps between two points that pictures get.
THINNED = 10

NUCLEAR = schatten.maps.Nuclear(schatten.solvers.svd())


@dataclass(frozen=True)
class Case:
    """Decay, where F is smallest, between which numbers both singular values of a start are drawn, and where runs shall end."""

    name: str
    decay: float
    optimum: tuple[float, float]
    starts: tuple[float, float]
    target: tuple[float, float]

    @property
    def radius(self) -> float:
        return 1 / self.decay


CASES = (
    Case("inside", 1.25, (0.6, 0.3), (0.05, 0.75), (0.6, 0.3)),
    # Of all points of the ball the corner is nearest to the optimum, in the norm of A too.
    Case("outside", 4.0, (0.6, 0.5), (0.3, 1.2), (0.25, 0.25)),
    Case("entering", 1.25, (0.3, 0.6), (1.0, 1.6), (0.3, 0.6)),
)


def loss(X: Tensor, optimum: tuple[float, float]) -> Tensor:
    """F, (2, 2) -> ()."""
    d = X.diagonal() - torch.tensor(optimum, dtype=X.dtype)
    return d @ A @ d / 2


def start(case: Case, seed: int) -> Tensor:
    """A diagonal matrix whose singular values `seed` draws."""
    low, high = case.starts
    generator = torch.Generator().manual_seed(seed)
    return torch.diag(low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64))


def measured(case: Case, seed: int, steps: int) -> Mapping[str, Any]:
    """A run of exact Muon as Lion-K: where it ends, and in how many steps F, V_B and V_K rise.

    V_K counts from inside the ball on. By the curvature of a step, which is of order lr^2, it may rise: `V_K_beyond` are the
    steps in which it rises by more (`schatten.diagnostics.lyapunov_change_bound`). `monotone` steps, with `loss_rises` among
    them, pass before its first rise of any size, when it has fallen to `V_K_left` of what it was inside the ball at first.
    """
    X = nn.Parameter(start(case, seed))
    opt = schatten.LionK([X], NUCLEAR, lr=LR, weight_decay=case.decay, betas=BETAS, decay="implicit")
    weights, momenta, gradients, losses = [], [], [], []
    for _ in range(steps + 1):
        opt.zero_grad()
        value = loss(X, case.optimum)
        value.backward()
        assert X.grad is not None
        weights.append(X.detach().clone())
        momenta.append(opt.state[X]["momentum_buffer"].clone())
        gradients.append(X.grad.clone())
        losses.append(value.detach())
        opt.step()
    W, M, G, F = map(torch.stack, (weights, momenta, gradients, losses))
    V_B = ball_violation(W, case.decay)
    V_K = lyapunov(NUCLEAR, W, M, F, LR, case.decay, BETAS)
    allowed = lyapunov_change_bound(NUCLEAR, W, M, G, SMOOTHNESS, LR, case.decay, BETAS).curvature[:-1]
    inside = V_B[:-1] == 0
    risen = torch.where(inside, _rises(V_K), 0) > 0
    first = int(risen.int().argmax()) if risen.any() else steps
    off = W[-1].diagonal().abs() - torch.tensor(case.target, dtype=W.dtype)
    entry = int(inside.int().argmax()) if inside.any() else None
    found = {
        "off": float(off.abs().max()),
        "entry": entry,
        "V_K_beyond": int((torch.where(inside, V_K.diff() - allowed, 0) > ROUNDING * V_K.abs().max()).sum()),
        "V_K_left": float(V_K[first] / V_K[entry]) if entry is not None else None,
        "V_K_rises": int(risen.sum()),
        "V_B_rises": int((_rises(V_B) > 0).sum()),
        "monotone": first,
        "loss_rises": int((_rises(F)[:first] > 0).sum()),
        "loss_largest": float(_rises(F)[:first].amax()) if first else 0.0,
    }
    sigma = W.diagonal(dim1=-2, dim2=-1).abs()[::THINNED]
    return {**found, "decay": case.decay, "optimum": case.optimum, "sigma": sigma.tolist()}


def _rises(values: Tensor) -> Tensor:
    """By how much each step raised `values`, 0 where it did not, (steps + 1) -> (steps)."""
    grown = values.diff()
    return torch.where(grown > ROUNDING * values.abs().max(), grown, 0.0)
