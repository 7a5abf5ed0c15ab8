"""Odd quintic iterations and weighted sums of their iterates, in two forms of the same polynomial.

Product form: X <- a X + B X with B = b A + c A^2 and A = X X^T, for X of m x n with m <= n. Gram form: all steps act on
m x m matrices that are polynomials of one A, and X is multiplied at the end, which saves work when n is large against m.
Rounding of A grows with the square of the iteration's gain there, so X and A are formed anew at `restarts`. Neither form
mixes columns but in A, which `columns` forms: X may be some of a matrix's columns.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import combinations

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers.core import ALL, Columns
from schatten.solvers.remembered import remembered

Quintic = tuple[float, float, float]
Weight = float | Tensor

# How a X + B X is made of (B, X, a) at the end.
Last = Callable[[Tensor, Tensor, float], Tensor]

# An iteration, as `cheaper_form` gives it, and what it is to apply.
Form = tuple[Callable[..., Tensor], Sequence[Quintic]]

# How much larger than the product form's the Gram form's rounding error may be, on each trial matrix.
TOLERATED = 3.0
MAX_RESTARTS = 3

# Small matrices on which the Gram form must stay in the band, so many that a wrong choice of restarts shows: of Gaussian
# 2 x 4 matrices one in a thousand leaves it with bf16 restarts before steps 2 and 3, and with fp16 ones one log-uniform one
# in ten thousand.
SMALL = ((2, 4), (3, 7), (4, 8))
SMALL_COUNT = 8000
WIDENING = 0.02

# Trial matrices: small, as rounding of one product hardly depends on its size, and as hard as gradients are.
TRIAL = (24, 96)


def cheaper_form(
    m: int, n: int, quintics: Sequence[Quintic], dtype: torch.dtype, summed: bool = False, half: bool = False
) -> Callable[..., Tensor]:
    """The form that multiplies less for (b, m, n), m <= n: `(X, quintics, weights, A, columns, last) -> Tensor`.

    It gives the last iterate, or with weights w_0..w_n the sum of w_k X_k. X has singular values up to 1; `A` is X X^T where
    the caller has it; n counts all of `columns`. A sum comes in fp32, or fp64 for fp64 X; a weight is a number or a (b, 1, 1)
    tensor. Pass X without keeping a name for it, and its memory is free after the first step. Of the last iterate, not of a
    sum, the last product may be left to `last`, so that it goes where it is needed at once. `half` says that symmetric
    products cost half.
    """
    restarts = restarts_for(tuple(quintics), dtype, summed)
    if gram_cost(m, n, len(quintics), len(restarts), summed, half) < product_cost(m, n, len(quintics), half):
        return partial(gram_form, restarts=restarts)
    return product_form


def product_cost(m: int, n: int, steps: int, half: bool = False) -> float:
    """Multiplications of `product_form`; `half` of each symmetric product where kernels compute no more."""
    share = 0.5 if half else 1.0
    return steps * ((1 + share) * m * m * n + share * m**3)


def gram_cost(m: int, n: int, steps: int, restarts: int, summed: bool, half: bool = False) -> float:
    """Multiplications of `gram_form`: four m x m products a step, of which the segments' ends save some."""
    share = 0.5 if half else 1.0
    large = (1 + share) * (restarts + 1) + (restarts if summed else 0)
    return large * m * m * n + share * (4 * steps - 3 * (restarts + 1)) * m**3


def product_form(
    X: Tensor,
    quintics: Sequence[Quintic],
    weights: Sequence[Weight] | None = None,
    A: Tensor | None = None,
    columns: Columns = ALL,
    last: Last | None = None,
) -> Tensor:
    """`cheaper_form` by products with X in every step."""
    total = None if weights is None else scaled(X, weights[0])
    # Buffers, unless autograd needs every iterate: the sum of a step's products, and two X taking turns.
    reused = not (torch.is_grad_enabled() and X.requires_grad)
    given = A is not None
    B: Tensor | None = None
    spare: list[Tensor] = []
    for k, (a, b, c) in enumerate(quintics):
        if k > 0 or A is None:
            A = columns.gram(X, out=A if reused and not (given and k == 1) else None)
        B = kernels.sym(A, A, A, b, c, out=B if reused else None)
        if last is not None and total is None and k + 1 == len(quintics):
            return last(B, X, a)
        weight = 1.0 if weights is None else weights[k + 1]
        new = kernels.affine(B, X, a, out=spare.pop() if spare else None, total=total, weight=weight)
        if reused and k > 0:  # the first X is the caller's
            spare.append(X)
        X = new
    return X if total is None else total


def gram_form(
    X: Tensor,
    quintics: Sequence[Quintic],
    weights: Sequence[Weight] | None = None,
    A: Tensor | None = None,
    columns: Columns = ALL,
    last: Last | None = None,
    *,
    restarts: Sequence[int],
) -> Tensor:
    """`cheaper_form` on R = X X^T; X and R are formed anew before each step in `restarts`.

    With X_k = Q X for the X of the segment: Z = b R + c R^2, Q <- Q (a I + Z), R <- (a I + Z)^2 R.
    """
    R = columns.gram(X) if A is None else A
    Q = None
    sums = None if weights is None else _Sums(X, weights[0])
    for k, (a, b, c) in enumerate(quintics):
        if k in restarts and Q is not None:
            if sums is not None:
                sums.close(X)
            X = kernels.affine(Q, X, 0.0)
            R, Q = columns.gram(X), None
        Z = kernels.sym(R, R, R, b, c)
        weight = 1.0 if weights is None else weights[k + 1]
        if Q is None:
            Q = plus_identity(Z, a)
            if sums is not None:
                sums.open(Q, weight)
        else:
            Q = kernels.sym(Q, Z, Q, a, 1.0, total=sums.matrix if sums is not None else None, weight=weight)
        if k + 1 < len(quintics) and k + 1 not in restarts:
            P = kernels.sym(R, Z, R, a, 1.0)
            R = kernels.sym(Z, P, P, a, 1.0)
    assert Q is not None
    if sums is None:
        return kernels.affine(Q, X, 0.0) if last is None else last(Q, X, 0.0)
    sums.close(X)
    return sums.total


class _Sums:
    """w_0 X_0 + sum of w_k Q_k X over segments with their own X; the small matrices are added up before X is multiplied."""

    def __init__(self, X: Tensor, weight: Weight) -> None:
        self.total = scaled(X, weight)
        self.matrix: Tensor | None = None

    def open(self, Q: Tensor, weight: Weight) -> None:
        self.matrix = scaled(Q, weight)

    def close(self, X: Tensor) -> None:
        assert self.matrix is not None
        kernels.affine(self.matrix.to(X.dtype), X, 0.0, total=self.total)
        self.matrix = None


def plus_identity(Z: Tensor, a: float) -> Tensor:
    """a I + Z."""
    Q = Z.clone()
    Q.diagonal(dim1=-2, dim2=-1).add_(a)
    return Q


def wide(X: Tensor) -> Tensor:
    """X in the precision sums are kept in."""
    return X if X.dtype == torch.float64 else X.float()


def scaled(X: Tensor, weight: Weight) -> Tensor:
    """weight X, in fp32 or fp64."""
    return torch.mul(X, weight) if X.dtype in (torch.float32, torch.float64) else wide(X).mul_(weight)


# What is found must not depend on who asks first.
@remembered
@kernels.use("eager")
def restarts_for(quintics: tuple[Quintic, ...], dtype: torch.dtype, summed: bool = False) -> tuple[int, ...]:
    """The fewest restarts with which the Gram form's rounding error stays near the product form's, and of those the best.

    Rounding of X X^T is not relative to its small eigenvalues, and grows by the square of every slope until the polynomial
    leaves its range; a restart forms it anew. Both forms are run in `dtype` on trial matrices with log-uniform, power-law and
    flat spectra, and compared with fp64; on many small ones no result may leave the band (`_bounded`).
    """
    if dtype == torch.float64:  # the reference itself; fp32's restarts leave it as far from any limit
        return restarts_for(quintics, torch.float32, summed)
    X = _trials()
    # Weights that stand for any sum: most fall on the last iterate, which rounding has hit most often.
    weights = [1 / (len(quintics) + 1)] * len(quintics) + [1.0] if summed else None
    exact = product_form(X, quintics, weights)

    def errors(Y: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(Y.double() - exact).nan_to_num(torch.inf)

    allowed = TOLERATED * errors(product_form(X.to(dtype), quintics, weights))
    for count in range(min(MAX_RESTARTS, len(quintics) - 1) + 1):
        worst = {
            restarts: float((errors(gram_form(X.to(dtype), quintics, weights, restarts=restarts)) / allowed).max())
            for restarts in combinations(range(1, len(quintics)), count)
        }
        for restarts in sorted(worst, key=lambda r: worst[r]):
            if worst[restarts] <= 1 and _bounded(quintics, dtype, weights, restarts):
                return restarts
    # Nothing is near enough: a restart before every step, which is the product form at its price.
    return tuple(range(1, len(quintics)))


def _bounded(
    quintics: tuple[Quintic, ...], dtype: torch.dtype, weights: Sequence[Weight] | None, restarts: tuple[int, ...]
) -> bool:
    """Whether the Gram form keeps small matrices in the band, to `WIDENING`.

    One large and one small singular value in a small matrix, or in a diagonal block of a large one, is the worst case:
    rounding of a Q that enlarges the small direction twentyfold falls on the large one, and an iterate ten percent out of a
    quintic's range is lost in the next steps. In larger matrices rounding errors of many entries cancel.
    """
    for X in _small():
        highest = torch.linalg.matrix_norm(product_form(X, quintics, weights), ord=2).max()
        Y = gram_form(X.to(dtype), quintics, weights, restarts=restarts).double().nan_to_num(1e9, 1e9, -1e9)
        if torch.linalg.matrix_norm(Y, ord=2).max() > highest * (1 + WIDENING):
            return False
    return True


@lru_cache(maxsize=1)
def _small() -> list[Tensor]:
    """Gaussian and log-uniform matrices (b, m, n) of the shapes in `SMALL`, in fp64 with Frobenius norm 1."""
    found = []
    for m, n in SMALL:
        generator = torch.Generator().manual_seed(m)
        gaussian = torch.randn(SMALL_COUNT, m, n, generator=generator, dtype=torch.float64)
        U, s, Vh = torch.linalg.svd(gaussian, full_matrices=False)
        log_uniform = 10 ** (-3 * torch.rand(s.shape, generator=generator, dtype=torch.float64))
        log_uniform[:, 0] = 1
        X = torch.cat([gaussian, (U * log_uniform.unsqueeze(-2)) @ Vh])
        found.append(X / torch.linalg.matrix_norm(X, keepdim=True))
    return found


def _trials() -> Tensor:
    """Fixed matrices (b, m, n) in fp64 with spectral norm 1/2, as a Frobenius norm of 1 leaves it: five spectra, two bases."""
    m, n = TRIAL
    index = torch.arange(1, m + 1, dtype=torch.float64)
    falling = [torch.logspace(0, end, m, dtype=torch.float64) for end in (-2, -3)]
    spectra = torch.stack([*falling, 1 / index, index**-2, 1.2 - index / m])
    matrices = []
    for shift in (0.0, 0.5):
        k = torch.arange(1, n * n + 1, dtype=torch.float64).reshape(n, n) + shift
        U, V = torch.linalg.qr(torch.sin(k * k)[:m, :m]).Q, torch.linalg.qr(torch.cos(k * k)).Q[:, :m]
        matrices.append(0.5 * (U * spectra.unsqueeze(-2)) @ V.mT)
    return torch.cat(matrices)
