"""The largest singular value of every matrix of a batch, from below and nearly, by power iteration on X X^T."""

import torch
from torch import Tensor

# Four vectors, twelve products of width four, on which a bf16 product of width m spends as long as on a sixth of one.
# `tests/facts/test_solver_fit.py` holds what comes out.
VECTORS = 4
PRODUCTS = 12

# What solvers multiply the estimate by: matrices of the zoo then end at or below 1; one with a flat spectrum and a leading
# singular value 15 % above it at 1.017.
SAFETY = 1.03


def start(m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Fixed pseudo-random vectors (m, VECTORS): equal calls give equal results, and torch's generators are not touched.

    sin(k^2) is equidistributed and, unlike ones or unit vectors, orthogonal to no structured singular vector.
    """
    k = torch.arange(1, m * VECTORS + 1, device=device, dtype=torch.float64).reshape(m, VECTORS)
    return torch.sin(k * k).to(dtype)


def spectral_norm_from_gram(A: Tensor) -> Tensor:
    """sqrt(lambda_max(A)), (b, m, m) -> (b, 1, 1) in fp32 or fp64; 0 for zero."""
    m = A.shape[-1]
    V = start(m, A.device, A.dtype).expand(A.shape[0], m, VECTORS)
    growth = V.new_ones(())
    for _ in range(PRODUCTS):
        W = torch.bmm(A, V)
        size = W.float().norm(dim=-2, keepdim=True) if W.dtype != torch.float64 else W.norm(dim=-2, keepdim=True)
        growth = size
        V = (W / torch.where(size == 0, 1, size)).to(A.dtype)
    return growth.amax(dim=-1, keepdim=True).sqrt()
