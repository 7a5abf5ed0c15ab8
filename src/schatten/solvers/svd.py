"""Exact spectral functions by a double-precision SVD: the oracle every other solver is tested against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.solvers.core import SpectralFunction, check_matrices


@dataclass(frozen=True)
class _SVD:
    def __call__(self, X: Tensor) -> Tensor:
        return _of_singular_values(X, lambda s, _: torch.ones_like(s))

    def apply(self, X: Tensor, f: SpectralFunction) -> Tensor:
        return _of_singular_values(X, lambda s, Y: f.h(s, f.threshold(Y)))

    def check(self, f: SpectralFunction) -> None:
        """Any function will do."""

    def __repr__(self) -> str:
        return "svd()"


def _of_singular_values(X: Tensor, h: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    check_matrices(X, "X")
    # One unusable matrix must not make LAPACK raise for the whole batch: it is computed on zeros and marked after.
    finite = X.isfinite().all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    Y = torch.where(finite, X, 0).double()
    U, s, Vh = torch.linalg.svd(Y, full_matrices=False)
    if s.shape[-1] == 0:
        return X.clone()
    # A half-precision matrix is taken for its exact value: its own eps times 1000 columns would drop everything.
    rounding = max(X.shape[-2:]) * min(torch.finfo(X.dtype).eps, torch.finfo(torch.float32).eps)
    kept = s > rounding * s[..., :1]
    values = torch.where(kept, h(torch.where(kept, s, 0), Y), 0)
    return torch.where(finite, (U * values.unsqueeze(-2)) @ Vh, torch.nan).to(X.dtype)


def svd() -> _SVD:
    """U V^T of the compact SVD, or any U h(Sigma) V^T, computed in fp64 and returned in the input's dtype.

    Singular values below `max(m, n) * eps` of the largest count as zero, eps that of the dtype or of fp32 if smaller:
    their directions get 0, so a rank-deficient matrix has a well-defined result and a zero matrix gives zero.
    Error: fp64 rounding, about 1e-14.

    Example:
        >>> import torch, schatten
        >>> schatten.solvers.svd()(torch.diag(torch.tensor([3.0, 0.0])))
        tensor([[1., 0.],
                [0., 0.]])
    """
    return _SVD()
