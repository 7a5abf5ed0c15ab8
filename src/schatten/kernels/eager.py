"""The three products in plain torch: the reference for every other back-end.

All take batches `(b, m, n)` of one dtype, never write to an input, and run one GEMM each with the sum in its epilogue.
`out` is a tensor of the result's shape and layout to write to: an iteration that passes the same few saves the page
faults of fresh memory, on a CPU as long as a product in bf16. It must be no input, and autograd does not see through it.
"""

import torch
from torch import Tensor


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """`X X^T`, shape (b, m, n) -> (b, m, m)."""
    return torch.bmm(X, X.mT, out=out)


def sym(A: Tensor, B: Tensor, C: Tensor, a: float, b: float, out: Tensor | None = None) -> Tensor:
    """`a C + b A B` for symmetric A, B, C that commute, so that the result is symmetric too; all (b, m, m)."""
    return torch.baddbmm(C, A, B, beta=a, alpha=b, out=out)


def affine(B: Tensor, X: Tensor, a: float, out: Tensor | None = None) -> Tensor:
    """`a X + B X` for symmetric B, shapes (b, m, m) and (b, m, n) -> (b, m, n), in X's memory layout.

    A tall matrix seen as wide is a transposed view: it is multiplied from the right, as later element-wise work on
    mixed layouts would take twenty times as long on a CPU.
    """
    if X.stride(-1) != 1 and X.stride(-2) == 1:
        T, into = X.mT, None if out is None else out.mT
        return (torch.bmm(T, B, out=into) if a == 0 else torch.baddbmm(T, T, B, beta=a, out=into)).mT
    return torch.bmm(B, X, out=out) if a == 0 else torch.baddbmm(X, B, X, beta=a, out=out)
