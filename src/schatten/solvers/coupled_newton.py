"""The coupled Newton-Schulz iteration of the spectral-powers paper, as published."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers.core import SpectralFunction, check_matrices, on_wide_batch

STEPS = 15
EPS = 1e-6
RIDGE = 1e-4

# Half powers taken one after the other for each exponent the paper has.
HALVINGS = {0.5: 1, 0.25: 2}


@dataclass(frozen=True)
class _CoupledNewton:
    def apply(self, X: Tensor, f: SpectralFunction) -> Tensor:
        check_matrices(X, "X")
        self.check(f)
        work = X.dtype if X.dtype in (torch.float32, torch.float64) else torch.float32
        return on_wide_batch(X, lambda Y: _power(Y.to(work), HALVINGS[f.degree]))

    def check(self, f: SpectralFunction) -> None:
        """Refuse all but the two powers of the paper."""
        if f.degree not in HALVINGS or f.family is not None or f.rank is not None:
            raise ValueError(f"coupled_newton() computes Power(0.5) and Power(0.25) only, not {f}: use tower() or svd().")

    def __repr__(self) -> str:
        return "coupled_newton()"


def _power(X: Tensor, halvings: int) -> Tensor:
    for _ in range(halvings):
        inverse_root = _square_roots(kernels.gram(X))[1]
        X = kernels.affine(_square_roots(inverse_root)[0], X, 0.0)
    return X


def _square_roots(A: Tensor) -> tuple[Tensor, Tensor]:
    """A^(1/2) and A^(-1/2) of (b, n, n) with the paper's ridge, scaling and symmetrisation."""
    n = A.shape[-1]
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    A = A + (EPS + RIDGE * trace / n) * eye
    c = torch.linalg.matrix_norm(A, keepdim=True)
    Y, Z = A / c, eye.expand_as(A)
    three = (1.5 * eye).expand_as(A)
    for k in range(STEPS):
        # Full products: with half of each computed and mirrored, as kernels.sym may do, the iteration diverges where A is
        # ill-conditioned (768 x 768, rank one and 1e-3 noise, in fp32).
        T = torch.baddbmm(three, Z, Y, alpha=-0.5)
        Y, Z = torch.bmm(Y, T), torch.bmm(T, Z)
        if k in (5, 10):
            Y, Z = (Y + Y.mT) / 2, (Z + Z.mT) / 2
    Y, Z = (Y + Y.mT) / 2, (Z + Z.mT) / 2
    return c.sqrt() * Y, Z / c.sqrt()


def coupled_newton() -> _CoupledNewton:
    """U S^(1/2) V^T and U S^(1/4) V^T exactly as Qi et al. released them (arXiv 2602.04669, code 56dd187).

    A^(-1/4) from two runs of the coupled iteration T = (3 I - Z Y)/2, Y <- Y T, Z <- T Z, 15 steps each, on X X^T with a
    ridge of 1e-6 + 1e-4 tr/n; the power 1/4 is the half power taken twice. In fp32, or fp64 for fp64 input.

    It is here for comparison. Its ridge damps small directions, to 0.48 (p = 1/2) of the power at 1e-3 of the largest
    singular value, and makes the result depend on the input's scale, by 40 % for a matrix of norm 1e-3; it costs 92
    (184) square products where the tower takes 21. For exact roots use `coupled_minimax()`.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Power(0.5, solver=schatten.solvers.coupled_newton())
        >>> K.grad(100 * torch.eye(2)).round(decimals=1)
        tensor([[10.,  0.],
                [ 0., 10.]])
    """
    return _CoupledNewton()
