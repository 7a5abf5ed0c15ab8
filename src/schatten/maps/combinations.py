"""Maps made of maps: positive multiples and sums."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.maps.core import UNCONSTRAINED, Combinable, Map


@dataclass(frozen=True)
class Scaled(Combinable):
    """(c K)(S) = c K(S), written `c * map`, c > 0: the direction c grad K, of the same shape and another length.

    (c K)*(X) = c K*(X / c), so decoupled decay lambda solves the map's problem with lambda / c.

    Raises ValueError for c outside (0, inf).

    Example:
        >>> import torch, schatten
        >>> K = 2 * schatten.maps.Frobenius()
        >>> K.describe(0.5)
        'min F subject to Frobenius norm <= 4.0'
    """

    map: Map
    c: float

    def __post_init__(self) -> None:
        check_factor(self.c)
        if not isinstance(self.map, Map) or isinstance(self.map, type):
            raise TypeError(f"a multiple is of a map of schatten.maps, got {self.map!r}.")
        object.__setattr__(self, "c", float(self.c))

    def value(self, S: Tensor) -> Tensor:
        """c K(S), (*b, m, n) -> (*b)."""
        return self.c * self.map.value(S)

    def grad(self, S: Tensor) -> Tensor:
        """c grad K(S), (*b, m, n) -> (*b, m, n)."""
        return self.c * self.map.grad(S)

    def conjugate(self, X: Tensor) -> Tensor:
        """c K*(X / c), (*b, m, n) -> (*b)."""
        return self.c * self.map.conjugate(X.double() / self.c)

    def violation(self, X: Tensor) -> Tensor:
        """c times the violation of X / c, (*b, m, n) -> (*b)."""
        return self.c * self.map.violation(X.double() / self.c)

    def prox(self, S: Tensor, tau: float) -> Tensor:
        """argmin over X of c K(X) + ||X - S||_F^2 / (2 tau)."""
        return prox_of(self.map)(S, tau * self.c)

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """The problem that decoupled decay makes a rule on this map solve."""
        return self.map.describe(weight_decay, factor * self.c)


@dataclass(frozen=True)
class Sum(Combinable):
    """(K_1 + K_2 + ...)(S), written `map + map`: the directions are added (Fanions, arXiv 2512.09678).

    `0.5 * Nuclear() + 0.5 * Frobenius()` is F-Muon's map, with `0.01 * L1()` S-Muon's. K* is the infimal convolution,
    min of K_1*(X_1) + K_2*(X_2) + ... over X_1 + X_2 + ... = X; for norms it is 0 on the Minkowski sum of the dual balls and
    infinity outside. `conjugate` and `violation` (the distance to that set in Frobenius norm) are found in fp64 by
    Douglas-Rachford splitting, to 1e-7 of the norm of X; they are instruments, slow, and no part of a step.

    Raises ValueError for fewer than two maps.

    Example:
        >>> import torch, schatten
        >>> K = 0.5 * schatten.maps.L1() + 0.5 * schatten.maps.Frobenius()
        >>> K.grad(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.8000, -0.9000]])
    """

    maps: tuple[Map, ...]

    def __post_init__(self) -> None:
        flat: list[Map] = []
        for K in self.maps:
            flat += K.maps if isinstance(K, Sum) else [K]
        for K in flat:
            if not isinstance(K, Map) or isinstance(K, type):
                raise TypeError(f"a sum is of maps of schatten.maps, got {K!r}.")
        if len(flat) < 2:
            raise ValueError(f"Sum needs at least two maps, got {len(flat)}.")
        object.__setattr__(self, "maps", tuple(flat))

    def value(self, S: Tensor) -> Tensor:
        """The sum of the values, (*b, m, n) -> (*b)."""
        return torch.stack([K.value(S) for K in self.maps]).sum(0)

    def grad(self, S: Tensor) -> Tensor:
        """The sum of the directions, (*b, m, n) -> (*b, m, n)."""
        first, *others = (K.grad(S) for K in self.maps)
        for D in others:
            first = first + D
        return first

    def conjugate(self, X: Tensor) -> Tensor:
        """K*(X), the infimal convolution of the conjugates; (*b, m, n) -> (*b)."""
        return self._each(X, 0)

    def violation(self, X: Tensor) -> Tensor:
        """The Frobenius distance of X from the domain of K*, 0 inside; (*b, m, n) -> (*b)."""
        return self._each(X, 1)

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """The problem that decoupled decay makes a rule on this map solve."""
        if weight_decay == 0:
            return UNCONSTRAINED
        problems = [f"[{K.describe(weight_decay, factor).removeprefix('min F').strip()}]" for K in self.maps]
        parts = [f"W_{i}" for i in range(1, len(problems) + 1)]
        return f"min F over W = {' + '.join(parts)}, " + ", ".join(f"{W} {p}" for W, p in zip(parts, problems, strict=True))

    def _each(self, X: Tensor, which: int) -> Tensor:
        flat = X.double().reshape(-1, *X.shape[-2:])
        results = [_infimal_convolution(self.maps, x)[which] for x in flat]
        return torch.stack(results).reshape(X.shape[:-2]) if results else flat.new_zeros(X.shape[:-2])


def check_factor(c: float) -> None:
    """Refuse a multiple that is not convex or not a number."""
    if isinstance(c, bool) or not isinstance(c, (int, float)) or not 0 < c < math.inf:
        raise ValueError(f"a map can be multiplied by 0 < c < inf, got c={c!r}.")


def prox_of(K: Map) -> Callable[[Tensor, float], Tensor]:
    """The map's proximal map."""
    prox = getattr(K, "prox", None)
    if prox is None:
        raise TypeError(f"conjugate and violation of a sum need maps with a prox(S, tau), and {K!r} has none.")
    return prox


# Relative to the norm of X. Fixed points are reached at a linear rate on generic matrices, in 50 to 500 steps.
CONVERGED = 1e-10
# At a point on the boundary where the rate is sublinear, what is left after MAX_STEPS counts as 0 up to here.
CLOSE = 1e-7
MAX_STEPS = 20_000
FAR = 1e9  # K(FAR R) / FAR is the slope of K towards infinity


def _infimal_convolution(maps: tuple[Map, ...], X: Tensor) -> tuple[Tensor, Tensor]:
    """K*(X) and the distance of X from the domain of K*, for one matrix, by Douglas-Rachford splitting.

    Minimises K_1*(Y_1) + ... subject to Y_1 + ... = X; the proximal map of a conjugate is Moreau's Z - prox_K(Z). Where
    there is no such Y, the remainder R = X - sum Y tends to the shortest one, and <R, X> > slope of K along R proves it.
    """
    zero = X.new_zeros(())
    size = torch.linalg.matrix_norm(X) if X.numel() else zero
    if size == 0:
        return zero, zero
    proxes = [prox_of(K) for K in maps]
    Z = [X / len(maps) for _ in maps]
    Y, R = Z, X
    for step in range(1, MAX_STEPS + 1):
        Y = [z - prox(z, 1.0) for z, prox in zip(Z, proxes, strict=True)]
        R = X - torch.stack(Y).sum(0)
        reflected = [2 * y - z for y, z in zip(Y, Z, strict=True)]
        shared = (X - torch.stack(reflected).sum(0)) / len(maps)
        moves = [r + shared - y for r, y in zip(reflected, Y, strict=True)]
        Z = [z + move for z, move in zip(Z, moves, strict=True)]
        if max(torch.linalg.matrix_norm(move) for move in moves) <= CONVERGED * size:
            break
        if step % 20 == 0:
            r = torch.linalg.matrix_norm(R)
            slope = torch.stack([K.value(FAR * R) for K in maps]).sum() / FAR
            if (R * X).sum() - slope > 0.999 * r * r > 0 and r > CLOSE * size:
                return X.new_tensor(torch.inf), r
    r = torch.linalg.matrix_norm(R)
    if r > CLOSE * size:
        return X.new_tensor(torch.inf), r
    return torch.stack([K.conjugate(y) for K, y in zip(maps, Y, strict=True)]).sum(0), zero
