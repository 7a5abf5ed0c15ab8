"""The rate of a momentum estimator on a synthetic stochastic problem, along the schedules of its theorem.

    F(W) = <W, W H> / 2 + CURVE sum (1 - cos w_ij),   one sample: grad f(W; xi) = W (H + Delta) + CURVE sin(W) + N

H diagonal from 0.1 to 1, so that F is smooth and not convex; Delta and N Gaussian of mean zero. Two gradients of one sample
differ by (W - W')(H + Delta) + ... without N, which is what the exact correction lives on.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import schatten
from schatten.solvers import Solver

FAN_OUT, FAN_IN = 8, 6
CURVE = 0.5

# The standard deviation of an entry of the first weights.
START = 0.5

# The standard deviation of an entry of N, and of Delta (shrunk by sqrt(FAN_IN), so of its norm).
NOISE, MULTIPLICATIVE = 0.3, 0.3


@dataclass(frozen=True)
class Estimator:
    """gamma of the correction, with the exact gradient or the stored one, and 1 - beta = t^-average, lr = lr_1 t^-step.

    `bound` is the exponent of the theorem, mean gradient norm = O~(T^-bound); 0 where there is none.
    """

    name: str
    gamma: float
    exact: bool
    average: float
    step: float
    bound: float

    @property
    def gradients(self) -> int:
        """Evaluations in a step."""
        return 2 if self.exact else 1


ESTIMATORS = (
    Estimator("momentum", 0.0, False, 1 / 2, 3 / 4, 0.0),
    Estimator("MVR1", 0.025, False, 1 / 2, 3 / 4, 1 / 4),
    Estimator("MVR1, gamma 1", 1.0, False, 1 / 2, 3 / 4, 0.0),
    Estimator("MVR2", 1.0, True, 2 / 3, 2 / 3, 1 / 3),
)


def gradient(W: Tensor) -> Tensor:
    """grad F."""
    return W * torch.linspace(0.1, 1.0, FAN_IN, dtype=W.dtype) + CURVE * W.sin()


def marks(steps: int) -> list[int]:
    """Numbers of steps at which a mean is taken, a factor sqrt(2) apart."""
    count = int(2 * math.log2(steps / 16)) if steps > 16 else 0
    return sorted({round(steps / 2 ** (k / 2)) for k in range(count + 1)})


def descend(
    estimator: Estimator, lr: float, steps: int, copies: int, seed: int, solver: Solver | None = None
) -> dict[str, list[float]]:
    """Mean Frobenius norm of grad F over the second half of every number of steps in `marks`, averaged over `copies` runs.

    `solver` is msign's, by default Muon's own.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = nn.Parameter(START * normal(copies, FAN_OUT, FAN_IN))
    optimizer = schatten.MuonMVR(
        [W], lr=lr, weight_decay=0.0, momentum=0.0, gamma=estimator.gamma, clip=False, exact=estimator.exact, scale="none",
        layout="experts", solver=solver,
    )  # fmt: skip
    (group,) = optimizer.param_groups
    norms = np.empty(steps)
    for t in range(1, steps + 1):
        Delta = normal(copies, FAN_IN, FAN_IN) * (MULTIPLICATIVE / FAN_IN**0.5)
        N = NOISE * normal(copies, FAN_OUT, FAN_IN)

        def closure(Delta: Tensor = Delta, N: Tensor = N) -> None:
            W.grad = gradient(W.detach()) + W.detach() @ Delta + N

        norms[t - 1] = torch.linalg.matrix_norm(gradient(W.detach())).mean()
        group["momentum"] = 1 - t**-estimator.average
        group["lr"] = lr * t**-estimator.step
        optimizer.step(closure)
    at = marks(steps)
    return {"steps": [float(T) for T in at], "norms": [float(norms[T // 2 : T].mean()) for T in at]}


def slope(steps: list[float], norms: list[float], share: float = 1 / 32) -> float:
    """The exponent of a power law fitted to the marks from `share` of the last on, where the start is forgotten."""
    pairs = [(math.log(T), math.log(norm)) for T, norm in zip(steps, norms, strict=True) if steps[-1] * share <= T and norm > 0]
    if len(pairs) < 2:
        return math.nan
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])
