"""The two problems, each from several starts at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PROBLEMS = ("factorisation", "attention", "rotated attention")


class Problem(Protocol):
    """Several starts of one problem: `start` (b, m, n), and at W of that shape the gradient and b relative errors.

    lr of a method are multiples of its `unit`.
    """

    @property
    def start(self) -> Tensor: ...

    def evaluate(self, W: Tensor) -> tuple[Tensor, Tensor]: ...

    def unit(self, method: str) -> float: ...


@dataclass(frozen=True, eq=False)
class Factorisation:
    """||X X^T - M*||_F^2 / 4; the error is ||X X^T - M*||_F / ||M*||_F."""

    target: Tensor
    start: Tensor

    @staticmethod
    def draw(kappa: float, seeds: Sequence[int], size: int = 40, rank: int = 8) -> "Factorisation":
        targets, starts = [], []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            Q, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
            targets.append((Q * geometric(kappa, rank)) @ Q.mT)
            starts.append(1e-3 * torch.randn(size, rank, generator=generator, dtype=torch.float64))
        return Factorisation(torch.stack(targets), torch.stack(starts))

    def evaluate(self, W: Tensor) -> tuple[Tensor, Tensor]:
        R = W @ W.mT - self.target
        return R @ W, torch.linalg.matrix_norm(R) / torch.linalg.matrix_norm(self.target)

    def unit(self, method: str) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class Attention:
    """tr(S (W - W*) A (W - W*)^T), all (b, n, n); the error is f / f_0, the gradient S (W - W*) A is without its factor 2."""

    spectrum: Tensor
    A: Tensor
    optimum: Tensor

    @staticmethod
    def build(kappa: float, seeds: Sequence[int] = (), size: int = 30, examples: int = 60) -> "Attention":
        """Diagonal, or in the random eigenvectors of each seed."""
        s = geometric(kappa, size)
        a = (1 + 1 / examples) * s.square() + s.sum() / examples * s
        if not seeds:
            return Attention(*(torch.diag(d)[None] for d in (s, a, s / a)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = [torch.randn(size, size, generator=generator, dtype=torch.float64) for generator in generators]
        R = torch.linalg.qr(torch.stack(drawn)).Q
        return Attention(*((R * d) @ R.mT for d in (s, a, s / a)))

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.optimum)

    def evaluate(self, W: Tensor) -> tuple[Tensor, Tensor]:
        def gradient(D: Tensor) -> Tensor:
            return self.spectrum @ D @ self.A

        D = W - self.optimum
        G = gradient(D)
        return G, (G * D).sum((-2, -1)) / (gradient(self.optimum) * self.optimum).sum((-2, -1))

    def unit(self, method: str) -> float:
        of = self.A if method == "GD" else self.optimum
        norm = float(torch.linalg.matrix_norm(of[0], ord=2))
        return 1 / norm if method == "GD" else norm


def geometric(kappa: float, count: int) -> Tensor:
    """From 1 to 1/kappa."""
    return float(kappa) ** -torch.linspace(0, 1, count, dtype=torch.float64)
