"""Roots of the Hermitian polar factor by a coupled iteration with minimax quintics: dyadic powers to 1e-4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers import minimax
from schatten.solvers.core import SpectralFunction, check_matrices, frobenius, on_wide_batch
from schatten.solvers.iteration import product_form
from schatten.solvers.spectral_norm import SAFETY, spectral_norm_from_gram

MARGIN = 1.01
LARGEST_POWER_OF_TWO = 4  # p = 1/16

# Products in fp32 leave 1e-6 in each of some fifty steps; asking for less than that buys nothing.
TOL = 1e-6


@dataclass(frozen=True)
class _CoupledMinimax:
    lower: float

    def apply(self, X: Tensor, f: SpectralFunction) -> Tensor:
        check_matrices(X, "X")
        self.check(f)
        work = X.dtype if X.dtype in (torch.float32, torch.float64) else torch.float32
        return on_wide_batch(X, lambda Y: _power(Y.to(work), f.degree, self.lower))

    def check(self, f: SpectralFunction) -> None:
        """Refuse all but powers +-1/2, +-1/4, ..."""
        dyadic = {sign * 2.0**-k for k in range(1, LARGEST_POWER_OF_TWO + 1) for sign in (1, -1)}
        if f.degree not in dyadic or f.family is not None or f.rank is not None:
            raise ValueError(f"coupled_minimax() computes powers +-1/2, +-1/4, +-1/8 and +-1/16 only, not {f}: use tower().")

    def __repr__(self) -> str:
        return f"coupled_minimax(lower={self.lower})"


def _power(X: Tensor, p: float, lower: float) -> Tensor:
    norm = frobenius(X)
    Y = kernels.quotient(X, norm, X.dtype)
    top = spectral_norm_from_gram(kernels.gram(Y))
    scale = SAFETY * torch.where(top == 0, 1, top)
    Y = Y / scale
    low = lower / SAFETY
    P = product_form(Y, _quintics(low))
    # X = H P with H = U S U^T: its condition is that of X, where X X^T has the square.
    H = torch.bmm(Y, P.mT)
    H = (H + H.mT) / 2
    power, Z = 1.0, H
    while power > abs(p):
        low = low**0.5
        H, Z = _roots(H, _quintics(low))
        power /= 2
    result = kernels.affine(H if p > 0 else Z, P, 0.0)
    return result * (scale * norm).pow(p)


def _quintics(low: float) -> tuple[minimax.Quintic, ...]:
    return minimax.composition(low, minimax.steps_for(TOL, low, margin=MARGIN), margin=MARGIN)[0]


def _roots(H: Tensor, quintics: tuple[minimax.Quintic, ...]) -> tuple[Tensor, Tensor]:
    """H^(1/2) and H^(-1/2), for eigenvalues in [low^2, 1] of the quintics' low.

    Y Z has the squares of the iterates of sqrt(H) as eigenvalues; T = a I + b Z Y + c (Z Y)^2 moves both factors.
    """
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    Y, Z = H, eye
    for a, b, c in quintics:
        M = kernels.sym(Z, Y, Y, 0.0, 1.0)
        M = (M + M.mT) / 2
        T = kernels.sym(M, M, M, b, c) + a * eye
        Y, Z = kernels.sym(Y, T, Y, 0.0, 1.0), kernels.sym(T, Z, Z, 0.0, 1.0)
    return (Y + Y.mT) / 2, (Z + Z.mT) / 2


def coupled_minimax(*, lower: float = 1e-3) -> _CoupledMinimax:
    """U S^p V^T for p = +-1/2, +-1/4, +-1/8, +-1/16, to 1e-4 for singular values of at least `lower` of the largest.

    The polar factor P gives X = H P with H = U S U^T; H^(1/2) and H^(-1/2) come together from a coupled iteration with
    minimax quintics, once for each halving. In fp32 (fp64 for fp64 input), without ridge, so c X gives c^p times the
    result. For p > 0 smaller singular values keep at most the power of `lower`; errors in fp64 are below 1e-5.

    For p = 1/2 it takes some 44 square products (60 for p = 1/4) against 21 of the tower, which is off by 1 %, and 92 of the
    published iteration (`coupled_newton`), which is off by up to 50 %.

    Raises ValueError for a lower end outside (0, 1).

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Power(0.25, solver=schatten.solvers.coupled_minimax())
        >>> K.grad(torch.diag(torch.tensor([16.0, 1.0]))).round(decimals=3)
        tensor([[2., 0.],
                [0., 1.]])
    """
    if not 0 < lower < 1:
        raise ValueError(f"lower must lie in (0, 1), got {lower}.")
    return _CoupledMinimax(lower)
