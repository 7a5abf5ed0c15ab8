"""The three products every solver is written in, and the division before them, behind one seam.

`gram(X) = X X^T`, `sym(A, B, C, a, b) = a C + b A B` where the result is known to be symmetric, `affine(B, X, a) = a X + B X`
and `quotient(X, divisor, dtype) = X / divisor`. Eager torch is the reference; Triton's kernels compute the same where they
run (`schatten.kernels.choice`). A product adds itself, times `weight`, to `total` on the way.
"""

from types import ModuleType

import torch
from torch import Tensor

from schatten.kernels import eager
from schatten.kernels.bucket import Bucket, Onto, Tables
from schatten.kernels.choice import on_triton, use

__all__ = ["Bucket", "Onto", "Tables", "affine", "gram", "halves", "quotient", "sym", "use"]

Weight = float | Tensor


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """`X X^T`, shape (b, m, n) -> (b, m, m)."""
    return _backend(X).gram(X, out)


def sym(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: float,
    b: float,
    out: Tensor | None = None,
    *,
    total: Tensor | None = None,
    weight: Weight = 1.0,
) -> Tensor:
    """`a C + b A B` for symmetric A, B, C that commute, so that the result is symmetric too; all (b, m, m).

    `total` (b, m, m) in fp32 or fp64 grows by `weight`, a number or (b, 1, 1), times the result.
    """
    return _backend(A).sym(A, B, C, a, b, out, total, weight)


def affine(
    B: Tensor, X: Tensor, a: float, out: Tensor | None = None, *, total: Tensor | None = None, weight: Weight = 1.0
) -> Tensor:
    """`a X + B X` for symmetric B, shapes (b, m, m) and (b, m, n) -> (b, m, n), in X's memory layout.

    `total` (b, m, n) in fp32 or fp64 grows by `weight`, a number or (b, 1, 1), times the result.
    """
    return _backend(X).affine(B, X, a, out, total, weight)


def quotient(X: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """`X / divisor` per matrix, (b, m, n) and (b, 1, 1), divided in fp32 (fp64 for fp64 input) and rounded once."""
    return _backend(X, products=False).quotient(X, divisor, dtype)


def halves(X: Tensor, work: torch.dtype) -> bool:
    """Whether symmetric products of matrices like `X`, in precision `work`, are computed by half at every size."""
    return on_triton(X, work)


def _backend(X: Tensor, *, products: bool = True) -> ModuleType:
    if not on_triton(X, products=products):
        return eager
    from schatten.kernels import triton

    return triton
