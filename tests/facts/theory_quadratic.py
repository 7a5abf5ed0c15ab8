"""The 15 x 20 quadratic of Shen et al. (2505.23737), figure 3: f(W) = tr((W - W*)^T Q (W - W*)) / 2, from W = 0.

Its Hessian is Q for every column, so L = ||Q||_op and L_* = ||Q||_nuc, in Frobenius and in spectral norm. Q's eigenvalues are
not published, nor W* of panels (a) and (b). Everything here is written in Q's eigenvectors: Q is diagonal.
"""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import root
from torch import Tensor, nn

import schatten

ROWS, COLUMNS = 15, 20
STEPS = 4000
MUON_STEP = 0.048

# ||Q||_nuc / ||Q||_op, inferred from panel (c).
NUCLEAR_RATIO = 1.31

# Panel (c): counts of D_F^2 L / (D_op^2 L_*), in units of 10^4 of about 10^5, and the same inferred from the spectra of W*.
EDGES = [2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5]
COUNTS = [0.03, 0.9, 4.2, 4.07, 0.8, 0.02]
SHARES = [0.002, 0.083, 0.419, 0.407, 0.086, 0.003]

# Panels (a) and (b), read off curves.
START, START_NORM = 370.0, 180.0
END, END_NORM = 21.0, 53.0
CROSSING, CROSSING_NORM = 1000, 1400
ARRIVAL, FLOOR = 3720, 0.15

# W* in the directions where Q is large, against the others.
FAINT = 1e-3


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Entries from U(-50, 50), fp64."""
    return 100 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 50


def ratios(samples: int, seed: int = 0, nuclear_ratio: float = NUCLEAR_RATIO) -> Tensor:
    """D_F^2 L / (D_op^2 L_*) of so many W* with entries from U(-50, 50), (samples)."""
    W = uniform(torch.Generator().manual_seed(seed), samples, ROWS, COLUMNS)
    largest = torch.linalg.eigvalsh(W @ W.mT)[:, -1]
    return W.square().sum((-2, -1)) / (largest * nuclear_ratio)


def shares(values: Tensor) -> list[float]:
    """The shares of values in the bins between `EDGES`."""
    return (torch.histogram(values, torch.tensor(EDGES, dtype=values.dtype)).hist / len(values)).tolist()


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Eigenvalues of Q (15) and W* (15, 20) in its eigenvectors."""

    q: Tensor
    optimum: Tensor

    @property
    def L(self) -> float:
        return float(self.q.max())

    @property
    def nuclear_ratio(self) -> float:
        return float(self.q.sum()) / self.L

    def value(self, W: Tensor) -> Tensor:
        """f of (*b, 15, 20) -> (*b)."""
        return (self.q[:, None] * (W - self.optimum).square()).sum((-2, -1)) / 2

    def distance(self, W: Tensor) -> Tensor:
        """||W - W*||_op of (*b, 15, 20) -> (*b)."""
        return torch.linalg.matrix_norm(W - self.optimum, ord=2)

    def gradient(self, W: Tensor) -> Tensor:
        return self.q[:, None] * (W - self.optimum)

    def descended(self, steps: Tensor) -> Tensor:
        """Gradient descent with step 1 / L from 0 after so many steps, (steps, 15, 20): W* less (1 - q / L)^t of it."""
        return self.optimum * (1 - (1 - self.q / self.L) ** steps[:, None])[:, :, None]


def even(seed: int) -> Quadratic:
    """W* from U(-50, 50) in all directions, Q's eigenvalues geometric with the published ratio, f(0) = 370."""
    optimum = uniform(torch.Generator().manual_seed(seed), ROWS, COLUMNS)
    q = (1 - 1 / NUCLEAR_RATIO) ** torch.arange(ROWS, dtype=torch.float64)
    return _scaled(q, optimum)


def most_left(nuclear_ratio: float = NUCLEAR_RATIO) -> float:
    """The most of f(0) that gradient descent with step 1 / L can leave after 4000 steps if W* is even in all directions.

    A direction keeps x (1 - x)^8000 of L, x = q / L, which is largest at x = 1 / 8001; the largest one keeps nothing.
    """
    x = 1 / (2 * STEPS + 1)
    return (ROWS - 1) * x * (1 - x) ** (2 * STEPS) / nuclear_ratio


def fitted(seed: int, slow: int) -> Quadratic:
    """What has the published start and end of f and of the norm: W* lies in `slow` directions in which Q is small.

    There W* is from U(-50, 50), scaled to spectral norm 180, and Q's eigenvalues are geometric, from the two that make gradient
    descent end at f = 21 and norm 53. Elsewhere W* is a thousandth of U(-50, 50), one eigenvalue is L, and the others are equal
    with ||Q||_nuc / ||Q||_op as published; with 14 slow directions there are none and it is 1. f(0) = 370 sets Q's scale.
    """
    generator = torch.Generator().manual_seed(seed)
    optimum = uniform(generator, ROWS, COLUMNS)
    optimum[: ROWS - slow] *= FAINT
    optimum *= START_NORM / torch.linalg.matrix_norm(optimum, ord=2)

    def spectrum(lowest: float, spread: float) -> Tensor:
        below = lowest * spread ** torch.linspace(1, 0, slow, dtype=torch.float64)
        rest = max(1, ROWS - 1 - slow)
        middle = torch.full((ROWS - 1 - slow,), (NUCLEAR_RATIO - 1 - float(below.sum())) / rest, dtype=torch.float64)
        return torch.cat([torch.ones(1, dtype=torch.float64), middle, below])

    def missed(logs) -> list[float]:
        problem = _scaled(spectrum(*map(math.exp, logs)), optimum)
        last = problem.descended(torch.tensor([STEPS]))[0]
        return [math.log(float(problem.value(last)) / END), math.log(float(problem.distance(last)) / END_NORM)]

    found = root(missed, [math.log(2.5e-4), math.log(2.0)])
    if not found.success:
        raise RuntimeError(f"No Q fits seed {seed} with {slow} slow directions: {found.message}")
    return _scaled(spectrum(*map(math.exp, found.x)), optimum)


def muon(problems: list[Quadratic], steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """f and ||W - W*||_op of simplified Muon at steps 0, ..., `steps` of each problem, (steps + 1) each."""
    weights = [nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.float64)) for _ in problems]
    opt = schatten.SimplifiedMuon(weights, lr=MUON_STEP, adaptive=False)
    paths = torch.zeros(len(problems), steps + 1, ROWS, COLUMNS, dtype=torch.float64)
    for t in range(steps):
        for W, problem in zip(weights, problems, strict=True):
            W.grad = problem.gradient(W.detach())
        opt.step()
        for i, W in enumerate(weights):
            paths[i, t + 1] = W.detach()
    return [(problem.value(path), problem.distance(path)) for problem, path in zip(problems, paths, strict=True)]


def descent(problem: Quadratic, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """The same of gradient descent with step 1 / L."""
    path = problem.descended(torch.arange(steps + 1))
    return problem.value(path), problem.distance(path)


def crossing(muon: Tensor, descent: Tensor) -> int:
    """The first step from which on Muon's curve lies below gradient descent's; 0 where it always does."""
    above = torch.nonzero(muon > descent)
    return int(above[-1]) + 1 if len(above) else 0


def arrival(distance: Tensor) -> int:
    """The first step after which ||W - W*||_op is less than 1 % of its start."""
    return int(torch.nonzero(distance < 0.01 * distance[0])[0])


def _scaled(q: Tensor, optimum: Tensor) -> Quadratic:
    return Quadratic(q * START / float((q[:, None] * optimum.square()).sum() / 2), optimum)
