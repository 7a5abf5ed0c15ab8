"""Muon^p (Dong and Sawin, 2606.13867): the released recurrences, which are not the powers they are named after."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers.core import check_matrices, check_steps, dtype_name, normalised, on_wide_batch, working_dtype

# Source: released matrix code; numerator, denominator and c of Y <- Y - c ((Y Y^T)^((b-1)/2) Y - (X X^T)^((a-1)/2) X). For
# 1/3 the default c; an older one, 1.090452, falls back to 0.61 of the power at 0.6.
ODD = {"1/3": (1, 3, 0.66), "1/5": (1, 5, 0.2), "1/7": (1, 7, 1 / 7), "1/15": (1, 15, 1 / 15), "3/5": (3, 5, 0.2)}
ODD["13/15"] = (13, 15, 1 / 15)

# Y <- Y - ((Y Y^T)^2 - X X^T)(c X + d Y): the matrix code's c and d. With c = -3, as in its scalar twin, the output is
# negative.
HALF = (3.0, -0.795918)

NAMES = ("1/2", *ODD)


@dataclass(frozen=True)
class _MuonP:
    p: str
    steps: int
    dtype: str

    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        work = working_dtype(X, self.dtype)
        return on_wide_batch(X, lambda Y: self._iterated(normalised(Y, work)))

    def _iterated(self, X: Tensor) -> Tensor:
        Y = X
        if self.p == "1/2":
            c, d = HALF
            XX = kernels.gram(X)
            for _ in range(self.steps):
                A = kernels.gram(Y)
                Y = Y - kernels.affine(kernels.sym(A, A, XX, -1.0, 1.0), c * X + d * Y, 0.0)
            return Y
        a, b, c = ODD[self.p]
        target = X if a == 1 else kernels.affine(_power(kernels.gram(X), (a - 1) // 2), X, 0.0)
        for _ in range(self.steps):
            Y = Y - c * (kernels.affine(_power(kernels.gram(Y), (b - 1) // 2), Y, 0.0) - target)
        return Y

    def __repr__(self) -> str:
        return f"muon_p({self.p!r}, steps={self.steps}, dtype={self.dtype!r})"


def _power(A: Tensor, exponent: int) -> Tensor:
    """A^exponent of symmetric matrices by squaring."""
    result: Tensor | None = None
    while exponent:
        if exponent & 1:
            result = A if result is None else kernels.sym(result, A, A, 0.0, 1.0)
        exponent >>= 1
        if exponent:
            A = kernels.sym(A, A, A, 0.0, 1.0)
    assert result is not None
    return result


def muon_p(p: str, *, steps: int = 6, dtype: torch.dtype | str = "auto") -> _MuonP:
    """Muon^p's six steps for p = 1/2, 1/3, 1/5, 1/7, 1/15, 3/5 or 13/15 on X / ||X||_F, as released.

    It is not sigma^p: six steps from Y = X reach the power near sigma = 1 only. Output over sigma^p of the Frobenius norm:

    | p | 1e-3 | 1e-2 | 0.03 | 0.1 | 0.3 | 0.6 | 1 |
    |---|---|---|---|---|---|---|---|
    | 1/2 | 0.03 | 0.10 | 0.18 | 0.36 | 0.92 | 0.71 | 1 |
    | 1/3 | 0.05 | 0.23 | 0.47 | 0.88 | 1.00 | 1.00 | 1 |
    | 1/5 | 0.01 | 0.06 | 0.13 | 0.35 | 0.80 | 1.00 | 1 |
    | 1/7 | 0.005 | 0.04 | 0.09 | 0.26 | 0.66 | 0.99 | 1 |
    | 1/15 | 0.002 | 0.02 | 0.05 | 0.16 | 0.46 | 0.87 | 1 |
    | 3/5 | 0.06 | 0.16 | 0.25 | 0.40 | 0.68 | 0.96 | 1 |
    | 13/15 | 0.40 | 0.54 | 0.63 | 0.74 | 0.85 | 0.94 | 1 |

    For the power itself use `schatten.spectral_power`. Raises ValueError for another p or fewer than one step.

    Example:
        >>> import torch, schatten
        >>> Y = schatten.solvers.muon_p("1/3", dtype="float32")(torch.diag(torch.tensor([1.0, 0.1])))
        >>> bool(Y[1, 1] < 0.9 * 0.1 ** (1 / 3))
        True
    """
    if p not in NAMES:
        raise ValueError(f"p must be one of {', '.join(map(repr, NAMES))}, got {p!r}; any other power is spectral_power(G, p).")
    check_steps(steps)
    return _MuonP(p, steps, dtype_name(dtype))
