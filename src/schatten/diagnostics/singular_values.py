"""Singular values for instruments: in fp64, and nan for a matrix that is not finite instead of LAPACK's exception."""

import torch
from torch import Tensor

from schatten.solvers.core import check_matrices


def singular_values(matrix: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The singular values of matrices (*b, m, n), descending, (*b, min(m, n)); nan for a matrix that is not finite.

    They are exact to rounding, about eps ||X||_op each in `dtype`, fp64 or the faster fp32. One SVD without vectors. On a GPU
    LAPACK's check makes the host wait.

    Raises TypeError for anything but a real floating-point tensor, ValueError for fewer than two dimensions.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.singular_values import singular_values
        >>> [round(s, 4) for s in singular_values(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()]
        [5.0, 0.0]
    """
    check_matrices(matrix, "matrix")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}: half precision knows no small values.")
    X = matrix.detach().to(dtype)
    finite = X.isfinite().all(-1).all(-1)
    s = torch.linalg.svdvals(torch.where(finite[..., None, None], X, 0))
    return torch.where(finite[..., None], s, torch.nan)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where the whole is 0 (a zero matrix); nan stays nan."""
    return torch.where(whole == 0, 0.0, part / torch.where(whole == 0, 1.0, whole))
