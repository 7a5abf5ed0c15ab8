"""Weights that make a spectral function out of shared iterates: the linear programme behind the tower.

Given iterates X_0(x) = x, X_1, ..., X_n of odd quintics, the weights minimise the largest error

    E = max over x in [lower, 1] of |sum_k w_k X_k(x) - h(x)| / scale(x),    scale = h (relative) or 1 (absolute),

subject to sum_k w_k X_k(x) >= 0 below `lower`, where an unconstrained fit may flip the sign of small directions. This is
a linear programme in n + 2 unknowns; an interior-point method in fp64 solves a batch of them at once, so the library needs
nothing but torch. `tests/facts/test_solver_fit.py` compares it with SciPy's.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Quintic = tuple[float, float, float]

POINTS = 400  # log-spaced in [lower, 1]; the iterates' ripples are wider than their spacing of 2 %
BELOW = 40  # log-spaced in [lower / 1e3, lower], for the sign


class Fit(NamedTuple):
    """Weights w_0..w_n, the error they leave on [lower, 1] and sum |w|, by which rounding of the iterates is amplified."""

    weights: tuple[float, ...]
    error: float
    amplification: float


def scalar_iterates(quintics: Sequence[Quintic], x: Tensor) -> Tensor:
    """X_0(x), ..., X_n(x) for numbers x, stacked in front."""
    X = [x]
    for a, b, c in quintics:
        y = X[-1]
        X.append(y * (a + y * y * (b + y * y * c)))
    return torch.stack(X)


def grid(low: float, high: float, points: int) -> Tensor:
    """Log-spaced numbers in fp64."""
    return torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)


@lru_cache(maxsize=256)
def weights_for(h: Callable[[Tensor], Tensor], lower: float, quintics: tuple[Quintic, ...], error: str) -> Fit:
    """The best weights for a function h of numbers in [lower, 1]."""
    W, E = fit_many(h(grid(lower, 1.0, POINTS)).unsqueeze(-1), lower, quintics, error=error)
    weights = tuple(W[0].tolist())
    return Fit(weights, float(E[0]), sum(abs(w) for w in weights))


def fit_many(
    H: Tensor, lower: float, quintics: Sequence[Quintic], *, error: str, points: int = POINTS
) -> tuple[Tensor, Tensor]:
    """Weights (batch, n + 1) and errors (batch) for function values H (points, batch) on the grid of [lower, 1]."""
    if not bool((H.isfinite() & (H >= 0)).all()):
        raise ValueError(
            f"h must be finite and not negative on [{lower}, 1], got values from {float(H.min())} to {float(H.max())}."
        )
    H = H.double().T
    X = scalar_iterates(quintics, grid(lower, 1.0, points)).T
    below = grid(lower / 1e3, lower, BELOW)
    signs = (scalar_iterates(quintics, below) / below).T
    if error == "relative":
        if not bool((H > 0).all()):
            raise ValueError("a relative error needs h > 0 on the whole range: ask for error='absolute'.")
        basis, target = X / H.unsqueeze(-1), torch.ones_like(H)
    else:
        basis, target = X.expand(len(H), *X.shape), H
    # Functions that a single iterate represents, X_0 = identity above all, would make the programme degenerate at E = 0.
    Q, R = torch.linalg.qr(basis)
    V, E = _minimax(Q, target, signs @ torch.linalg.inv(R))
    return torch.linalg.solve_triangular(R, V.unsqueeze(-1), upper=True).squeeze(-1), E


def _minimax(basis: Tensor, target: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """min over (v, E) of E with |basis v - target| <= E and signs v >= 0, for a batch, by Mehrotra's predictor-corrector."""
    batch, points, n = basis.shape
    ones = basis.new_ones(batch, points, 1)
    # G z <= g with z = (v, E).
    G = torch.cat(
        [
            torch.cat([basis, -ones], -1),
            torch.cat([-basis, -ones], -1),
            torch.cat([-signs, signs.new_zeros(batch, signs.shape[1], 1)], -1),
        ],
        dim=1,
    )
    g = torch.cat([target, -target, target.new_zeros(batch, signs.shape[1])], 1)
    cost = basis.new_zeros(n + 1)
    cost[-1] = 1
    z = basis.new_zeros(batch, n + 1)
    z[:, :n] = torch.linalg.lstsq(basis, target.unsqueeze(-1)).solution.squeeze(-1)
    z[:, n] = (torch.einsum("bpn,bn->bp", basis, z[:, :n]) - target).abs().amax(-1) * 1.1 + 1e-3
    s = (g - torch.einsum("bpn,bn->bp", G, z)).clamp(min=1e-2)
    y = torch.full_like(s, 1 / s.shape[1])
    eye = torch.eye(n + 1, dtype=basis.dtype)
    for _ in range(60):
        primal = g - torch.einsum("bpn,bn->bp", G, z) - s
        dual = -(torch.einsum("bpn,bp->bn", G, y) + cost)
        gap = (s * y).mean(-1, keepdim=True)
        if bool((gap < 1e-13).all() and primal.abs().amax() < 1e-10):
            break
        D = y / s
        N = torch.einsum("bpn,bp,bpk->bnk", G, D, G)
        N = N + 1e-13 * torch.diagonal(N, dim1=-2, dim2=-1).amax(-1)[:, None, None] * eye
        state = G, primal, dual, s, y, torch.linalg.lu_factor(N)
        _, ds, dy = _newton(*state, -s * y)
        tau = (((s + _step(s, ds) * ds) * (y + _step(y, dy) * dy)).mean(-1, keepdim=True) / gap).pow(3)
        dz, ds, dy = _newton(*state, tau * gap - s * y - ds * dy)
        along, across = 0.995 * _step(s, ds), 0.995 * _step(y, dy)
        z, s, y = z + along * dz, s + along * ds, y + across * dy
    v = z[:, :n]
    return v, (torch.einsum("bpn,bn->bp", basis, v) - target).abs().amax(-1)


def _newton(
    G: Tensor, primal: Tensor, dual: Tensor, s: Tensor, y: Tensor, LU: tuple[Tensor, Tensor], product: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, ds, dy) with G^T dy = dual, G dz + ds = primal and y ds + s dy = product; LU factors G^T (y/s) G."""
    right = dual - torch.einsum("bpn,bp->bn", G, (product - y * primal) / s)
    dz = torch.linalg.lu_solve(*LU, right.unsqueeze(-1)).squeeze(-1)
    ds = primal - torch.einsum("bpn,bn->bp", G, dz)
    return dz, ds, (product - y * ds) / s


def _step(value: Tensor, change: Tensor) -> Tensor:
    """The longest step in [0, 1] that keeps value + step * change >= 0."""
    ratio = torch.where(change < 0, -value / change, torch.inf)
    return ratio.amin(-1, keepdim=True).clamp(max=1)
