"""The products and the division in plain torch: the reference for every other back-end.

All take batches `(b, m, n)` of one dtype, never write to an input, and run one GEMM each with the sum in its epilogue.
`out` is a tensor of the result's shape and layout to write to: an iteration that passes the same few saves the page
faults of fresh memory, on a CPU as long as a product in bf16. It must be no input, and autograd does not see through it.

Of large symmetric products in fp32 and fp64 a CPU computes little more than half: strips of rows up to the diagonal,
mirrored. In bf16, where a product takes a tenth of that time, copying the strips costs more than they save.
"""

import itertools

import torch
from torch import Tensor

# Strips and the smallest matrix that is cut: for 768 rows four strips take 0.77 (square) and 0.70 (n = 4 m) of the time,
# three or six of them a few percent more.
STRIPS = 4
LARGE = 512

# Larger matrices are divided one by one on a CPU, where a whole batch's temporaries would leave the cache.
CPU_PIECE = 1 << 16

Weight = float | Tensor


def gram(X: Tensor, out: Tensor | None = None) -> Tensor:
    """`X X^T`, shape (b, m, n) -> (b, m, m)."""
    if _in_strips(X):
        return _mirrored(X, X.mT, None, 0.0, 1.0, out)
    return torch.bmm(X, X.mT, out=out)


def sym(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    a: float,
    b: float,
    out: Tensor | None = None,
    total: Tensor | None = None,
    weight: Weight = 1.0,
) -> Tensor:
    """`a C + b A B` for symmetric A, B, C that commute, so that the result is symmetric too; all (b, m, m)."""
    result = _mirrored(A, B, C, a, b, out) if _in_strips(A) else torch.baddbmm(C, A, B, beta=a, alpha=b, out=out)
    _grow(total, result, weight)
    return result


def affine(
    B: Tensor, X: Tensor, a: float, out: Tensor | None = None, total: Tensor | None = None, weight: Weight = 1.0
) -> Tensor:
    """`a X + B X` for symmetric B, shapes (b, m, m) and (b, m, n) -> (b, m, n), in X's memory layout.

    A tall matrix seen as wide is a transposed view: it is multiplied from the right, as later element-wise work on
    mixed layouts would take twenty times as long on a CPU.
    """
    if X.stride(-1) != 1 and X.stride(-2) == 1:
        T, into = X.mT, None if out is None else out.mT
        result = (torch.bmm(T, B, out=into) if a == 0 else torch.baddbmm(T, T, B, beta=a, out=into)).mT
    else:
        result = torch.bmm(B, X, out=out) if a == 0 else torch.baddbmm(X, B, X, beta=a, out=out)
    _grow(total, result, weight)
    return result


def quotient(X: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """`X / divisor` per matrix, divided in fp32 (fp64 for fp64 input) and rounded once, in X's memory layout."""
    if X.device.type == "cpu" and len(X) > 1 and X[0].numel() > CPU_PIECE:
        Y = torch.empty_like(X, dtype=dtype)
        for x, d, y in zip(X, divisor, Y, strict=True):
            y.copy_(x.to(d.dtype) / d)
        return Y
    return (X.to(divisor.dtype) / divisor).to(dtype)


def _grow(total: Tensor | None, X: Tensor, weight: Weight) -> None:
    """total += weight X."""
    if total is None:
        return
    if isinstance(weight, Tensor):
        total.addcmul_(X, weight)
    else:
        total.add_(X, alpha=weight)


def _in_strips(X: Tensor) -> bool:
    return X.device.type == "cpu" and X.dtype in (torch.float32, torch.float64) and X.shape[-2] >= LARGE


def _mirrored(A: Tensor, B: Tensor, C: Tensor | None, a: float, b: float, out: Tensor | None) -> Tensor:
    """`a C + b A B`, known to be symmetric, from strips of its lower half."""
    m = A.shape[-2]
    out = A.new_empty(A.shape[0], m, m) if out is None else out
    bounds = [m * k // STRIPS for k in range(STRIPS + 1)]
    for start, end in itertools.pairwise(bounds):
        if C is None:
            strip = torch.bmm(A[:, start:end], B[:, :, :end])
        else:
            strip = torch.baddbmm(C[:, start:end, :end], A[:, start:end], B[:, :, :end], beta=a, alpha=b)
        out[:, start:end, :end] = strip
        out[:, :start, start:end] = strip[:, :, :start].mT
    return out
