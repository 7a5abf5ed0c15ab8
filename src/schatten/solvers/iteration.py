"""Odd quintic iterations and weighted sums of their iterates, in two forms of the same polynomial.

Product form: X <- a X + B X with B = b A + c A^2 and A = X X^T, for X of m x n with m <= n. Gram form: all steps act on
m x m matrices that are polynomials of one A, and X is multiplied at the end, which saves work when n is large against m.
Rounding of A grows with the square of the iteration's gain there, so X and A are formed anew at `restarts`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from schatten import kernels

Quintic = tuple[float, float, float]
Weight = float | Tensor

# Unit roundoffs, with which `restarts_for` perturbs A.
UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

# How much larger than the product form's the simulated error of a Gram form may be.
TOLERATED = 2.0
MAX_RESTARTS = 3


def iterate(X: Tensor, quintics: Sequence[Quintic], weights: Sequence[Weight] | None = None, A: Tensor | None = None) -> Tensor:
    """The last iterate, or with weights w_0..w_n the sum of w_k X_k, in the cheaper form.

    X is (b, m, n) with m <= n and singular values up to 1; `A` is X X^T where the caller has it. A sum comes in fp32, or
    fp64 for fp64 X; a weight is a number or a (b, 1, 1) tensor.
    """
    m, n = X.shape[-2:]
    restarts = restarts_for(tuple(quintics), X.dtype, weights is not None)
    if gram_cost(m, n, len(quintics), len(restarts), weights is not None) < product_cost(m, n, len(quintics)):
        return gram_form(X, quintics, restarts, weights, A)
    return product_form(X, quintics, weights, A)


def product_cost(m: int, n: int, steps: int) -> int:
    """Multiplications of `product_form`."""
    return steps * (2 * m * m * n + m**3)


def gram_cost(m: int, n: int, steps: int, restarts: int, summed: bool) -> int:
    """Multiplications of `gram_form`: four m x m products a step, of which the segments' ends save some."""
    large = 2 * (restarts + 1) + (restarts if summed else 0)
    return large * m * m * n + (4 * steps - 3 * (restarts + 1)) * m**3


def product_form(
    X: Tensor, quintics: Sequence[Quintic], weights: Sequence[Weight] | None = None, A: Tensor | None = None
) -> Tensor:
    """`iterate` by products with X in every step."""
    total = None if weights is None else scaled(X, weights[0])
    for k, (a, b, c) in enumerate(quintics):
        if k > 0 or A is None:
            A = kernels.gram(X)
        X = kernels.affine(kernels.sym(A, A, A, b, c), X, a)
        if total is not None and weights is not None:
            add_(total, X, weights[k + 1])
    return X if total is None else total


def gram_form(
    X: Tensor,
    quintics: Sequence[Quintic],
    restarts: Sequence[int],
    weights: Sequence[Weight] | None = None,
    A: Tensor | None = None,
) -> Tensor:
    """`iterate` on R = X X^T; X and R are formed anew before each step in `restarts`.

    With X_k = Q X for the X of the segment: Z = b R + c R^2, Q <- a Q + Q Z, R <- (a I + Z)^2 R.
    """
    R = kernels.gram(X) if A is None else A
    Q = total = summed = None
    if weights is not None:
        summed = identity(R, weights[0])
    for k, (a, b, c) in enumerate(quintics):
        if k in restarts and Q is not None:
            if summed is not None:
                part = kernels.affine(summed.to(X.dtype), X, 0.0)
                total = wide(part) if total is None else total.add_(part)
                summed = torch.zeros_like(summed)
            X = kernels.affine(Q, X, 0.0)
            R, Q = kernels.gram(X), None
        Z = kernels.sym(R, R, R, b, c)
        Q = plus_identity(Z, a) if Q is None else kernels.sym(Q, Z, Q, a, 1.0)
        if summed is not None and weights is not None:
            add_(summed, Q, weights[k + 1])
        if k + 1 < len(quintics) and k + 1 not in restarts:
            P = kernels.sym(R, Z, R, a, 1.0)
            R = kernels.sym(Z, P, P, a, 1.0)
    assert Q is not None
    if summed is None:
        return kernels.affine(Q, X, 0.0)
    part = kernels.affine(summed.to(X.dtype), X, 0.0)
    return wide(part) if total is None else total.add_(part)


def wide(X: Tensor) -> Tensor:
    """X in the precision sums are kept in."""
    return X if X.dtype == torch.float64 else X.float()


def scaled(X: Tensor, weight: Weight) -> Tensor:
    """weight X, in fp32 or fp64."""
    return torch.mul(X, weight) if X.dtype in (torch.float32, torch.float64) else wide(X).mul_(weight)


def add_(total: Tensor, X: Tensor, weight: Weight) -> None:
    """total += weight X."""
    if isinstance(weight, Tensor):
        total.addcmul_(wide(X), weight)
    else:
        total.add_(X, alpha=weight)


def identity(R: Tensor, weight: Weight) -> Tensor:
    """weight I like R, in fp32 or fp64."""
    eye = torch.eye(R.shape[-1], dtype=torch.float64 if R.dtype == torch.float64 else torch.float32, device=R.device)
    return (eye * weight).expand(R.shape).contiguous()


def plus_identity(Z: Tensor, a: float) -> Tensor:
    """a I + Z."""
    Q = Z.clone()
    Q.diagonal(dim1=-2, dim2=-1).add_(a)
    return Q


@lru_cache(maxsize=256)
def restarts_for(quintics: tuple[Quintic, ...], dtype: torch.dtype, summed: bool = False) -> tuple[int, ...]:
    """The fewest restarts that keep the Gram form's rounding error near the product form's, and of those the best.

    Simulated on numbers: X X^T is off by +-u of its norm wherever it is formed, u the unit roundoff of `dtype`, and each
    x is followed through both forms. Without restarts -u grows by the square of every slope until the polynomial leaves
    its range; a restart resets it to u.
    """
    x = torch.logspace(0, -6, 61, dtype=torch.float64)
    x = torch.cat([x, x.new_zeros(1)])
    unit = UNIT[dtype]
    allowed = TOLERATED * max(_simulated(x, quintics, range(1, len(quintics)), unit, summed), unit)
    best: tuple[float, tuple[int, ...]] = (float("inf"), ())
    for count in range(min(MAX_RESTARTS, len(quintics) - 1) + 1):
        for restarts in combinations(range(1, len(quintics)), count):
            error = _simulated(x, quintics, restarts, unit, summed)
            if error < best[0]:
                best = (error, restarts)
        if best[0] <= allowed:
            break
    return best[1]


def _simulated(x: Tensor, quintics: Sequence[Quintic], restarts: Sequence[int], unit: float, summed: bool) -> float:
    """The largest change of an iterate, of the last one unless all are summed, when X X^T is off by +-unit."""
    worst = 0.0
    for sign in (1.0, -1.0):
        exact, x_k, q = x, x, torch.ones_like(x)
        r = x * x + sign * unit
        for k, (a, b, c) in enumerate(quintics):
            if k in restarts:
                x_k, q = q * x_k, torch.ones_like(x)
                r = x_k * x_k + sign * unit * float(x_k.abs().max()) ** 2
            factor = a + r * (b + r * c)
            q, r = q * factor, r * factor * factor
            exact = exact * (a + exact**2 * (b + exact**2 * c))
            error = float((q * x_k - exact).abs().nan_to_num(torch.inf).max())
            if summed or k + 1 == len(quintics):
                worst = max(worst, error)
    return worst
