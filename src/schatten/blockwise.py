"""Blockwise 8-bit storage: one signed byte per entry and one fp32 scale per 256 entries of a row.

A quarter of the memory of an fp32 average, and 1.6 % more for the scales. Rounding is stochastic: an average moves by
(1 - beta) of its distance from the gradient, which near its goal is less than half a step of 1/127 of the block's
largest entry, and rounding to nearest would stop it there.
"""

import torch
from torch import Tensor

from schatten.rounding import uniform16

BLOCK = 256

LEVELS = 127


def encode(X: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of X's shape (*b, n) and fp32 scales (*b, ceil(n / 256)), with mean code * scale = X.

    A block of zeros has scale 0.

    Example:
        >>> import torch
        >>> from schatten.blockwise import decode, encode
        >>> X = torch.tensor([[-127.0, 64.0, 0.0]])
        >>> codes, scales = encode(X, seed=0)
        >>> codes.tolist(), scales.tolist(), bool((decode(codes, scales) == X).all())
        ([[-127, 64, 0]], [[1.0]], True)
    """
    scales = _in_blocks(X).abs().amax(-1).float() / LEVELS
    quotient = X.float() / _of_entries(scales, X.shape[-1])
    noise = uniform16(quotient, seed).float() / (1 << 16)
    codes = torch.where(quotient.isfinite(), (quotient + noise).floor(), 0.0)
    return codes.clamp_(-LEVELS, LEVELS).to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """code * scale in fp32."""
    return codes * _of_entries(scales, codes.shape[-1])


def blocks_of(n: int) -> int:
    """How many scales a row of n entries has."""
    return -(-n // BLOCK)


def _in_blocks(X: Tensor) -> Tensor:
    n = X.shape[-1]
    padded = torch.nn.functional.pad(X, (0, blocks_of(n) * BLOCK - n))
    return padded.unflatten(-1, (blocks_of(n), BLOCK))


def _of_entries(scales: Tensor, n: int) -> Tensor:
    return scales.unsqueeze(-1).expand(*scales.shape, BLOCK).flatten(-2)[..., :n]
