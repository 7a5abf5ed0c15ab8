"""The three products in plain torch: the reference for every other back-end.

All take batches `(b, m, n)` of one dtype, never write to an input, and run one GEMM each with the sum in its epilogue.
"""

import torch
from torch import Tensor


def gram(X: Tensor) -> Tensor:
    """`X X^T`, shape (b, m, n) -> (b, m, m)."""
    return torch.bmm(X, X.mT)


def sym(A: Tensor, B: Tensor, C: Tensor, a: float, b: float) -> Tensor:
    """`a C + b A B` for symmetric A, B, C that commute, so that the result is symmetric too; all (b, m, m)."""
    return torch.baddbmm(C, A, B, beta=a, alpha=b)


def affine(B: Tensor, X: Tensor, a: float) -> Tensor:
    """`a X + B X`, shapes (b, m, m) and (b, m, n) -> (b, m, n)."""
    return torch.baddbmm(X, B, X, beta=a)
