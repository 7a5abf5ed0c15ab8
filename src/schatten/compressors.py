"""Compressors: what a worker sends instead of a matrix, for training with error feedback (EF21-Muon, arXiv 2510.00643).

A compressor is a frozen dataclass. `encode(X, seed)` makes the message, `decode(message, shape, dtype)` the matrices C(X)
a receiver sees, and `contraction(m, n)` is the alpha in (0, 1] of the law that error feedback needs,

    E ||C(X) - X||_F^2 <= (1 - alpha) ||X||_F^2    for every m x n matrix X,

up to rounding; the mean is over seeds, for `Natural` and `RankK` alone. X is (*b, m, n) in fp32 or fp64 with m, n >= 1; it
is not written to and may change as soon as `encode` has returned. The matrices of a batch are compressed one by one, with
the same noise, so a batch can be split at will. A zero matrix gives zero, a non-finite one non-finite values in itself only.

A message is a tuple of contiguous tensors that gloo and NCCL both carry. Their shapes and dtypes depend on the shape and
dtype of X alone, so that ranks can allocate them before they arrive, and the host reads no value. Noise comes from a
generator seeded by `seed` on X's device: a rank that knows the seed can repeat it, and ranks with different seeds have
independent errors.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Message = tuple[Tensor, ...]


@runtime_checkable
class Compressor(Protocol):
    """`decode(encode(X, seed), X.shape, X.dtype)` is C(X); `contraction(m, n)` bounds its error, see the module."""

    def encode(self, X: Tensor, seed: int) -> Message: ...

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...

    def contraction(self, m: int, n: int) -> float: ...


def message_bytes(message: Message) -> int:
    """What sending a message costs, in bytes.

    Example:
        >>> import torch
        >>> from schatten.compressors import Identity, Sign, message_bytes
        >>> X = torch.randn(64, 64)
        >>> message_bytes(Identity().encode(X, seed=0)), message_bytes(Sign().encode(X, seed=0))
        (16384, 516)
    """
    return sum(t.numel() * t.element_size() for t in message)


@dataclass(frozen=True)
class Identity:
    """C(X) = X, alpha = 1: no compression.

    Example:
        >>> import torch
        >>> from schatten.compressors import Identity
        >>> X = torch.randn(2, 3)
        >>> torch.equal(Identity().decode(Identity().encode(X, seed=0), X.shape, X.dtype), X)
        True
    """

    def encode(self, X: Tensor, seed: int) -> Message:
        return (X.clone(memory_format=torch.contiguous_format),)

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return message[0].view(shape).to(dtype)

    def contraction(self, m: int, n: int) -> float:
        return 1.0


@dataclass(frozen=True)
class TopK:
    """The k = ceil(share m n) entries of largest magnitude, the others zero; alpha = k / (m n), as no k entries hold more.

    Message: k values in X's dtype and the bytes of k positions, int16 up to 2^15 entries and int32 up to 2^31. Positions
    travel as bytes because neither gloo nor NCCL sends int16. In fp32 it is smaller than X for a share below 2/3
    (m n <= 2^15) or 1/2.

    Raises ValueError for a share outside (0, 1].

    Example:
        >>> import torch
        >>> from schatten.compressors import TopK
        >>> X, C = torch.tensor([[1.0, -5.0], [3.0, 2.0]]), TopK(0.5)
        >>> C.decode(C.encode(X, seed=0), X.shape, X.dtype)
        tensor([[ 0., -5.],
                [ 3.,  0.]])
    """

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ValueError(f"TopK needs a share 0 < share <= 1 of the entries, got share={self.share!r}.")
        object.__setattr__(self, "share", float(self.share))

    def encode(self, X: Tensor, seed: int) -> Message:
        flat = X.flatten(-2)
        positions = flat.abs().topk(self.count(*X.shape[-2:]), dim=-1, sorted=False).indices
        return flat.gather(-1, positions), positions.to(_position_dtype(flat.shape[-1])).view(torch.uint8)

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values, sent = message
        positions = sent.view(_position_dtype(shape[-2] * shape[-1])).long()
        X = torch.zeros(*shape[:-2], shape[-2] * shape[-1], dtype=dtype, device=values.device)
        return X.scatter_(-1, positions, values.to(dtype)).view(shape)

    def contraction(self, m: int, n: int) -> float:
        return self.count(m, n) / (m * n)

    def count(self, m: int, n: int) -> int:
        """k: how many entries of an m x n matrix are sent."""
        # 0.07 * 100 is a rounding error above 7, and its ceiling must not be 8.
        return math.ceil(self.share * m * n * (1 - 1e-12))


def _position_dtype(entries: int) -> torch.dtype:
    return next(d for d in (torch.int16, torch.int32, torch.int64) if entries - 1 <= torch.iinfo(d).max)


# Rounds of subspace iteration, each two products and a QR decomposition with k columns. Two hold 0.88 of what the best
# rank 8 holds of a Gaussian 64 x 64 matrix and 0.95 to 1.00 of gradients of a small GPT; one holds 0.76 and 0.85 to 0.99.
ROUNDS = 2


@dataclass(frozen=True)
class RankK:
    """X projected on k of its near-leading left or right singular directions; alpha = k / min(m, n), in the mean.

    For m <= n, C(X) = U U^T X with U from two rounds of U <- orth(X X^T U), the randomised subspace iteration of Halko,
    Martinsson and Tropp (2011), begun at k Gaussian columns; for m > n the same of X^T. An orthonormal basis U of the start
    holds ||U^T X||_F^2 = (k/m) ||X||_F^2 in the mean, as E U U^T = (k/m) I, and no round loses any: ||U^T X||_F^2 is convex
    in U, and among orthonormal U' its linear bound at U, a constant plus 2 <X X^T U, U'>, is largest for a basis of the
    range of X X^T U.

    The best rank k, a truncated SVD, has the same alpha without a seed. This is near it (see `ROUNDS`), asks for no check of
    convergence on the host and takes a thirtieth to a sixtieth of the SVD's time for k = 32 of 768 x 3072 on a CPU.

    Message: two factors in X's dtype, k (m + n) entries. Of matrices with fewer rows or columns than `rank`, k is that
    number, and C(X) = X.

    Raises ValueError for a rank that is no whole number >= 1.

    Example:
        >>> import torch
        >>> from schatten.compressors import RankK
        >>> X, C = torch.outer(torch.arange(3.0), torch.ones(4)), RankK(1)
        >>> torch.allclose(C.decode(C.encode(X, seed=0), X.shape, X.dtype), X, atol=1e-5)
        True
    """

    rank: int

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"RankK needs a whole rank >= 1, got rank={self.rank!r}.")

    def encode(self, X: Tensor, seed: int) -> Message:
        wide = X if X.shape[-2] <= X.shape[-1] else X.mT
        m = wide.shape[-2]
        generator = torch.Generator(X.device).manual_seed(seed)
        U = torch.randn(m, min(self.rank, m), generator=generator, dtype=X.dtype, device=X.device)
        # So that no column's norm overflows, nor its square where a backend's QR decomposition takes that.
        Y = wide / _largest(wide)
        for _ in range(ROUNDS):
            U = torch.linalg.qr(Y @ (Y.mT @ U)).Q
        return U.contiguous(), U.mT @ wide

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        U, W = message
        product = U @ W
        return (product if shape[-2] <= shape[-1] else product.mT).to(dtype)

    def contraction(self, m: int, n: int) -> float:
        return min(self.rank, m, n) / min(m, n)


# An integer as wide as the float, the float's mantissa bits, and the power that takes 1 to a biased exponent of 127.
_BITS: dict[torch.dtype, tuple[torch.dtype, int, float]] = {
    torch.float32: (torch.int32, 23, 1.0),
    torch.float64: (torch.int64, 52, 2.0**-896),
}


@dataclass(frozen=True)
class Natural:
    """Natural compression (Horvath et al., arXiv 1905.10988): entries go to a neighbouring power of two, with mean X.

        2^e <= |x| < 2^(e+1):   C(x) = sign(x) 2^(e+1) with probability |x|/2^e - 1, else sign(x) 2^e

    The error has mean square (|x| - 2^e)(2^(e+1) - |x|) <= x^2/8, worst at |x| = 4/3 2^e, so alpha = 7/8.

    Message: a byte per entry and a power of two per matrix in X's dtype. The byte is the sign and a 7-bit code, 0 for zero
    and c in 1 ... 127 for 2^(c - 127) t, where t is the power of two just above the largest entry. An entry below the
    window, |x| < w = 2^-126 t, goes to 0 or w, again with mean x and error x (w - x) <= w^2/4. As ||X||_F >= t/2 all of
    these together cost at most m n 2^-252 of ||X||_F^2, less than the rounding of 7/8 in fp64.

    A matrix with an entry of 2^127 or more (2^1023 in fp64), which might be rounded to infinity, counts as non-finite. In
    fp32 the mean of entries below w is off by up to 2^-149 t.

    Example:
        >>> import torch
        >>> from schatten.compressors import Natural
        >>> X, C = torch.full((64, 64), 3.0), Natural()
        >>> Y = C.decode(C.encode(X, seed=0), X.shape, X.dtype)
        >>> Y.unique().tolist(), bool(abs(Y.mean() - 3) < 0.1)
        ([2.0, 4.0], True)
    """

    def encode(self, X: Tensor, seed: int) -> Message:
        top = _largest(X)
        # Exact, and nan for an infinite or nan entry, which so marks its matrix.
        scale = top / torch.frexp(top).mantissa
        integer, mantissa, power = _BITS[X.dtype]
        bits = (X.abs() / scale * power).view(integer)
        generator = torch.Generator(X.device).manual_seed(seed)
        noise = torch.empty(X.shape[-2:], dtype=integer, device=X.device).random_(0, 1 << mantissa, generator=generator)
        # The mantissa carries into the exponent with the wanted probability, and among subnormals, those below the
        # window, into the first exponent.
        code = (bits + noise) >> mantissa
        return torch.where(X < 0, code + 128, code).to(torch.uint8).contiguous(), scale

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        byte, scale = message
        # The code is fp32's biased exponent.
        magnitude = ((byte.int() & 127) << 23).view(torch.float32).to(scale.dtype)
        return (torch.where(byte > 127, -magnitude, magnitude) * scale).to(dtype)

    def contraction(self, m: int, n: int) -> float:
        return 7 / 8


@dataclass(frozen=True)
class Sign:
    """mean |X| times the signs of X; alpha = ||X||_1^2 / (m n ||X||_F^2), 2/pi if Gaussian and at least 1 / (m n).

    With s = mean |X| each entry's error is (|x| - s)^2, whose sum is ||X||_F^2 - m n s^2. A bit has no third value, so zeros
    are sent as +s: their error is s^2, as the sum has it, which is why s is the mean over all entries and not over the
    others only. The worst case is a matrix with one entry.

    Message: the signs, eight to a byte, and s in X's dtype.

    Example:
        >>> import torch
        >>> from schatten.compressors import Sign
        >>> X, C = torch.tensor([[1.0, -5.0], [0.0, 2.0]]), Sign()
        >>> C.decode(C.encode(X, seed=0), X.shape, X.dtype)
        tensor([[ 2., -2.],
                [ 2.,  2.]])
    """

    def encode(self, X: Tensor, seed: int) -> Message:
        negative = (X < 0).flatten(-2).to(torch.uint8)
        padded = torch.nn.functional.pad(negative, (0, -negative.shape[-1] % 8))
        bits = padded.unflatten(-1, (-1, 8)) << _places(X.device)
        top = _largest(X)
        # The sum of 4096 numbers of 1e35 is beyond fp32.
        return bits.sum(-1, dtype=torch.uint8), (X.abs() / top).mean((-2, -1), keepdim=True) * top

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        packed, scale = message
        bits = (packed.unsqueeze(-1) >> _places(packed.device)) & 1
        negative = bits.flatten(-2)[..., : shape[-2] * shape[-1]].view(shape)
        return torch.where(negative == 1, -scale, scale).to(dtype)

    def contraction(self, m: int, n: int) -> float:
        return 1 / (m * n)


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _largest(X: Tensor) -> Tensor:
    """The largest magnitude of each matrix, (*b, m, n) -> (*b, 1, 1); 1 for a zero matrix."""
    top = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(top == 0, 1, top)


# More than there are workers: no two messages of a step share their noise, and none is repeated in a later step.
SENDERS = 1 << 20

SERVER = SENDERS - 1


def noise_seed(step: int, sender: int) -> int:
    """The seed of the message that worker `sender`, or `SERVER`, encodes in a step.

    Example:
        >>> from schatten.compressors import noise_seed
        >>> noise_seed(1, 0) == noise_seed(0, 1)
        False
    """
    return step * SENDERS + sender


def check_compressor(name: str, value: object) -> None:
    """Raise TypeError for what is no compressor; `name` is the caller's for the argument.

    Example:
        >>> from schatten.compressors import TopK, check_compressor
        >>> check_compressor("compressor", TopK(0.1))
    """
    if isinstance(value, type) or not isinstance(value, Compressor):
        raise TypeError(f"{name} must be a compressor of schatten.compressors, such as TopK(0.1), got {value!r}.")
