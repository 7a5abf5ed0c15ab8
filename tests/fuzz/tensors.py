"""Tensors in words: shape, dtype, values and strides, printed as the call that makes them and made the same each time."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED_DTYPES = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)

ORDINARY = ("normal", "zeros", "constant", "rank one", "sparse", "1e-30", "denormal", "mixed", "1e30")
EXTREME = ("1e38", "largest", "alternating")
GRADIENTS = (*ORDINARY, *EXTREME)
NON_FINITE = ("an inf", "a -inf", "a nan", "all nan")

STRIDES = ("dense", "transposed", "sliced", "offset", "permuted", "channels last")


@dataclass(frozen=True)
class Numbers:
    """A tensor in words."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    strides: str = "dense"
    seed: int = 0

    def make(self) -> Tensor:
        return laid_out(entries(self), self.strides)


def entries(n: Numbers) -> Tensor:
    generator = torch.Generator().manual_seed(n.seed)
    X = torch.randn(n.shape, generator=generator, dtype=torch.float64)
    if not n.dtype.is_floating_point:
        return X.mul(3).to(n.dtype)
    info = torch.finfo(n.dtype)
    match n.values:
        case "zeros":
            X = torch.zeros_like(X)
        case "constant":
            X = torch.full_like(X, 0.75)
        case "rank one" if X.ndim > 1:
            X = X[..., :1] * X[..., :1, :]
        case "sparse":
            X = X * (X > 0.5)
        case "1e-30" | "1e30" | "1e38":
            X = X * float(n.values)
        case "denormal":
            X = X.clamp(-1, 1) * info.smallest_normal / 2
        case "mixed":
            X = X * 10.0 ** torch.randint(-30, 31, n.shape, generator=generator)
        case "largest":
            X = X.sign() * info.max
        case "alternating":
            X = torch.full_like(X, info.max * (-1) ** n.seed)
    # All but the extreme kinds leave room for what a step adds to a weight.
    most = info.max if n.values in EXTREME else info.max / 1024
    X = X.clamp(-most, most).to(n.dtype)
    if n.values in NON_FINITE and X.numel():
        bad = float(n.values.split()[-1])
        if n.values.startswith("all"):
            X.fill_(bad)
        else:
            X.view(-1)[n.seed % X.numel()] = bad
    return X


def laid_out(t: Tensor, strides: str) -> Tensor:
    """The values of `t` in another order in memory, where its number of dimensions has such an order."""
    match strides:
        case "transposed" if t.ndim > 1:
            return t.mT.contiguous().mT
        case "sliced" if t.ndim > 0:
            return torch.stack([t, torch.ones_like(t)], -1).flatten(-2)[..., ::2]
        case "offset":
            return torch.cat([t.new_ones(3), t.reshape(-1)])[3:].view(t.shape)
        case "permuted" if t.ndim > 1:
            axes = tuple(reversed(range(t.ndim)))
            return t.permute(axes).contiguous().permute(axes)
        case "channels last" if t.ndim in (4, 5):
            return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)
        case "expanded" if t.ndim > 0 and t.numel():
            return t[:1].expand(t.shape)
    return t


SEEDS = st.integers(0, 9)


@st.composite
def numbers(draw, shape: tuple[int, ...], dtype: torch.dtype, values: tuple[str, ...], strides: tuple[str, ...] = STRIDES):
    return Numbers(shape, dtype, draw(st.sampled_from(values)), draw(st.sampled_from(strides)), draw(SEEDS))
