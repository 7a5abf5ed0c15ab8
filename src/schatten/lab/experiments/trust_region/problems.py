"""Stochastic matrix problems whose optimum is known, because the data are made to fit it.

    min over W of F(W) + R(W),   F(W) = <W - C, (W - C) H> / 2,   H diagonal from 0.1 to 1

C is chosen so that the optimality condition -grad F(W_opt) = (C - W_opt) H in the subdifferential of R holds at a W_opt drawn
first: C = W_opt + Z H^-1 with Z a subgradient. Three R: (decay/2) ||W||_F^2, a multiple of the nuclear norm (W_opt of low
rank), and the indicator of a spectral ball (W_opt with half of its singular values at the radius).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps import Frobenius, KyFan, Map, Nuclear
from schatten.maps.combinations import prox_of

FAN_OUT, FAN_IN = 12, 8
DECAY, PENALTY, RADIUS = 0.1, 0.5, 1.0

# The standard deviation of an entry of a gradient's noise.
NOISE = 0.1

# Noise must not repeat the numbers that the problem of its seed was drawn from.
NOISE_SEEDS = 1 << 20

KINDS = ("l2", "nuclear", "ball")


@dataclass(frozen=True)
class Problem:
    """F by C and the diagonal h of H; `optimum` minimises F + R for the R of `kind`."""

    kind: str
    C: Tensor
    h: Tensor
    optimum: Tensor

    @staticmethod
    def draw(kind: str, seed: int) -> "Problem":
        """A random problem in fp64."""
        generator = torch.Generator().manual_seed(seed)
        h = torch.linspace(0.1, 1.0, FAN_IN, dtype=torch.float64)
        U, _ = torch.linalg.qr(torch.randn(FAN_OUT, FAN_IN, generator=generator, dtype=torch.float64))
        V, _ = torch.linalg.qr(torch.randn(FAN_IN, FAN_IN, generator=generator, dtype=torch.float64))
        half = FAN_IN // 2
        some = 0.5 + torch.rand(half, generator=generator, dtype=torch.float64)
        rest = torch.rand(FAN_IN - half, generator=generator, dtype=torch.float64)
        if kind == "l2":
            optimum = (U * torch.cat([some, rest])) @ V.T
            Z = DECAY * optimum
        elif kind == "nuclear":
            optimum = (U[:, :half] * some) @ V[:, :half].T
            # The subdifferential of the norm: U V^T on the optimum's range, anything of spectral norm below 1 beside it.
            Z = PENALTY * (U * torch.cat([torch.ones(half, dtype=torch.float64), rest])) @ V.T
        else:
            optimum = RADIUS * (U * torch.cat([torch.ones(half, dtype=torch.float64), 0.9 * rest])) @ V.T
            # The normal cone of the ball: non-negative multiples of the directions at the radius.
            Z = (U[:, :half] * some) @ V[:, :half].T
        return Problem(kind, optimum + Z / h, h, optimum)

    def gradient(self, W: Tensor) -> Tensor:
        """grad F, without R."""
        return (W - self.C) * self.h

    def value(self, W: Tensor) -> Tensor:
        """F + R, for `ball` F alone."""
        smooth = ((W - self.C).square() * self.h).sum() / 2
        if self.kind == "l2":
            return smooth + DECAY * W.square().sum() / 2
        return smooth + PENALTY * torch.linalg.matrix_norm(W, "nuc") if self.kind == "nuclear" else smooth

    def gap(self, W: Tensor) -> float:
        """F + R above its minimum; of a W outside the ball it may be negative."""
        return float(self.value(W) - self.value(self.optimum))

    def outside(self, W: Tensor) -> float:
        """By how much W violates the constraint: ||W||_op above the radius, 0 for problems without one."""
        return max(0.0, float(torch.linalg.matrix_norm(W, 2)) - RADIUS) if self.kind == "ball" else 0.0

    @property
    def size(self) -> float:
        """Of the ball that gives the same optimum as R: of the Frobenius, the nuclear or the spectral norm."""
        order = {"l2": "fro", "nuclear": "nuc", "ball": 2}[self.kind]
        return float(torch.linalg.matrix_norm(self.optimum, order))


# The norm whose dual ball is projected onto, for each kind.
DUAL: dict[str, Map] = {"l2": Frobenius(), "nuclear": KyFan(1), "ball": Nuclear()}


def projected(kind: str, W: Tensor, size: float) -> Tensor:
    """The nearest point of the ball of the given size, by Moreau from the proximal map of the dual norm."""
    Y = W / size
    return size * (Y - prox_of(DUAL[kind])(Y, 1.0))


def proximal(kind: str, W: Tensor, lr: float) -> Tensor:
    """argmin of ||X - W||_F^2 / (2 lr) + R(X)."""
    if kind == "l2":
        return W / (1 + lr * DECAY)
    return Nuclear().prox(W, lr * PENALTY) if kind == "nuclear" else projected(kind, W, RADIUS)
