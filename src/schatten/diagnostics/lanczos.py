"""Lanczos: the extreme eigenvalues of a symmetric map that is known only by its products.

From a random start v the Krylov space v, H v, H^2 v, ... is made orthonormal, and H seen in it is a small tridiagonal matrix
whose eigenvalues, the Ritz values, find the ends of H's spectrum first. All earlier vectors are projected out at every step:
without that rounding makes copies of eigenvalues that have converged.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Estimate

# 1.648 sqrt(n) exp(-sqrt(eps) (2k - 1)): Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992) 1094-1122.
KUCZYNSKI_WOZNIAKOWSKI = 1.648

# A vector of this share of H's size, in units of its precision, is rounding: the space before it is invariant.
ROUNDING = 10


class Ritz(NamedTuple):
    """What k steps of Lanczos know of H; fp64 tensors on the device of the products.

    Attributes:
        values: (k), the Ritz values, ascending.
        weights: (k), squares of the first components of T's eigenvectors, which add up to 1: sum_i weights_i f(values_i) is
            Gauss's quadrature of v^T f(H) v for the normalised start v.
        residuals: (k), ||H y - value y|| for each Ritz vector y: an eigenvalue of H lies no farther from the Ritz value.
        diagonal: (k), that of the tridiagonal T.
        off_diagonal: (k - 1), beside it. A zero says that the space before it was invariant and a fresh direction went on.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.lanczos import lanczos
        >>> d, start = torch.tensor([1.0, 2.0, 5.0]).double(), torch.ones(3).double()
        >>> ritz = lanczos(lambda v: d * v, d, iterations=2, start=start)
        >>> round(float((ritz.weights * ritz.values**3).sum()), 6), round(float((start / 3) @ d**3), 6)
        (44.666667, 44.666667)
    """

    values: Tensor
    weights: Tensor
    residuals: Tensor
    diagonal: Tensor
    off_diagonal: Tensor


def lanczos(
    product: Callable[[Any], Any], like: Tensor | Sequence[Tensor], iterations: int = 20, *, seed: int = 0, start: Any = None
) -> Ritz:
    """Lanczos with full reorthogonalisation; `iterations` products, at most as many as there are entries.

    Vectors are kept in `like`'s precision, at least fp32, and so is what `product` gets. Memory: iterations + 3 vectors.
    Nothing waits for the device but, on CUDA, the eigenvalues of T at the end.

    Args:
        product: H v, symmetric: from a tensor of `like`'s shape to one, or from a list of tensors to a sequence of them.
        like: a tensor, or several for a map of all of them together, such as `Hessian.__call__` (`like=hessian.params`); only
            shapes, precision and device are read.
        iterations: k.
        seed: of the Gaussian start, drawn on the CPU, so that it is the same for every device.
        start: in place of the random start, a tensor or tensors as `like`; it need not be normalised.

    Products that are not finite give NaN. Raises ValueError for fewer than one iteration and for no entries.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.lanczos import lanczos
        >>> d = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        >>> lanczos(lambda v: d * v, d, iterations=3).values.round(decimals=6).tolist()
        [1.0, 2.0, 5.0]
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")
    parts = [like] if isinstance(like, Tensor) else list(like)
    size = sum(t.numel() for t in parts)
    if size == 0:
        raise ValueError(f"like must have entries, got shapes {[tuple(t.shape) for t in parts]}.")
    k, device = min(iterations, size), parts[0].device
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in parts) else torch.float32
    random = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)

    def times(v: Tensor) -> Tensor:
        pieces = [piece.view(t.shape) for piece, t in zip(v.split([t.numel() for t in parts]), parts, strict=True)]
        found = product(pieces[0] if isinstance(like, Tensor) else pieces)
        return _flat([found] if isinstance(found, Tensor) else found, dtype)

    Q = random.new_zeros(k, size)
    q = random if start is None else _flat([start] if isinstance(start, Tensor) else start, dtype)
    q = q / torch.linalg.vector_norm(q)
    scale, rounding = q.new_zeros(()), ROUNDING * torch.finfo(dtype).eps
    alphas, betas = [], []
    for j in range(k):
        Q[j] = q
        w = times(q)
        alphas.append(q @ w)
        w = _without(w, Q[: j + 1])
        beta = torch.linalg.vector_norm(w)
        scale = torch.maximum(scale, torch.maximum(alphas[-1].abs(), beta))
        # Of an invariant space nothing is left but rounding, or zeros: a fresh direction goes on, chosen without looking.
        ended = beta <= rounding * scale
        betas.append(torch.where(ended, 0, beta))
        if j + 1 < k:
            w = torch.where(ended, random.roll(j + 1), w / beta)
            # Twice is enough (Kahan and Parlett); the first time has been before beta for all but fresh directions.
            w = _without(_without(w, Q[: j + 1]), Q[: j + 1])
            q = w / torch.linalg.vector_norm(w)
    diagonal, off = torch.stack(alphas).double(), torch.stack(betas).double()
    T = torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1)
    # LAPACK raises for what is not finite; a loss that has overflowed gets NaN.
    finite = T.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(finite, T, 0))
    values = torch.where(finite, values, torch.nan)
    # The bound by T alone falls to 1e-30; products and vectors are rounded.
    residuals = torch.maximum(off[-1] * vectors[-1].abs(), rounding * scale.double())
    return Ritz(values, vectors[0].square(), residuals, diagonal, off[:-1])


def largest_eigenvalue(
    product: Callable[[Any], Any], like: Tensor | Sequence[Tensor], iterations: int = 20, *, seed: int = 0
) -> Estimate:
    """L, the largest |eigenvalue|, from below, by `lanczos`; `iterations` products.

    `value` is the size of the largest Ritz value: L is never smaller, up to rounding. `error` is that value's residual bound,
    no standard error: H has an eigenvalue within it, though possibly a larger one too, which `shortfall` bounds.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.lanczos import largest_eigenvalue
        >>> d = torch.linspace(-3, 1, 50, dtype=torch.float64)
        >>> L = largest_eigenvalue(lambda v: d * v, d)
        >>> bool(2.9 < L.value <= 3.0)
        True
    """
    ritz = lanczos(product, like, iterations, seed=seed)
    value, at = ritz.values.abs().max(0)
    # Indexing by a tensor of one number would wait for it.
    return Estimate(value, ritz.residuals.take(at))


def shortfall(size: int, iterations: int, failure: float = 0.05) -> float:
    """With probability 1 - failure over random starts L <= shortfall * `largest_eigenvalue`, whatever the spectrum.

    From Kuczynski and Wozniakowski (1992): Lanczos on n entries misses the largest eigenvalue by more than eps times the width
    of the spectrum with probability at most 1.648 sqrt(n) exp(-sqrt(eps) (2k - 1)), and the width is at most 2 L. It holds for
    exact arithmetic and the worst spectrum; where the residual is small, L is usually much closer. inf for too few iterations.

    Example:
        >>> from schatten.diagnostics.lanczos import shortfall
        >>> round(shortfall(128 * 64, 20), 3), round(shortfall(128 * 64, 40), 3)
        (1.092, 1.021)
    """
    if iterations >= size:
        return 1.0
    missed = 2 * (math.log(KUCZYNSKI_WOZNIAKOWSKI * math.sqrt(size) / failure) / (2 * iterations - 1)) ** 2
    return 1 / (1 - missed) if missed < 1 else math.inf


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors])


def _without(w: Tensor, Q: Tensor) -> Tensor:
    return w - (Q @ w) @ Q
