"""Rounding of fp32 results into half-precision parameters, and of state into bf16.

An update below half a unit in the last place (0.2 % of a bf16 weight) is lost by rounding to nearest, every time. With
stochastic rounding a value goes up or down with the probability that makes its mean exact, so small steps and decay
act on average; Kahan's compensation keeps what rounding lost in a second tensor. The noise is a hash of the step, the
parameter and the place: resumed runs repeat it, ranks agree on it, the user's random state is not touched, and as it
is computed on the device from a count there, a captured or compiled step draws new noise each time.
"""

import torch
from torch import Tensor

ROUNDINGS = ("stochastic", "kahan", "nearest")

HALF = (torch.bfloat16, torch.float16)


def uniform16(X: Tensor, seed: int | Tensor) -> Tensor:
    """int32 in [0, 2^16), uniform, one for each entry of `X` in its order; `seed` is a number or an integer tensor ().

    Or (n,), one for each X[i], whose noise is then what `X[i]` alone would have.

    C. Wellons' 32-bit mixer (two multiplications, bias 0.17 %) of place + hashed seed.
    """
    start = _mixed_(torch.as_tensor(_int32(seed), device=X.device).to(torch.int32).reshape(-1, 1).clone())
    place = torch.arange(X.numel() // len(start), dtype=torch.int32, device=X.device)
    x = place.add_(start[0]) if len(start) == 1 else place + start
    return _mixed_(x).bitwise_and_(0xFFFF).view(X.shape)


def _mixed_(x: Tensor) -> Tensor:
    # Shifts of int32 bring copies of the sign in from above; the masks take them out again.
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_int32(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _int32(seed: int | Tensor) -> int | Tensor:
    return seed if isinstance(seed, Tensor) else (seed ^ (seed >> 32) & 0xFFFFFFFF) % (1 << 32) - (1 << 32) * (seed >> 31 & 1)


def stochastic_bf16(X: Tensor, seed: int | Tensor) -> Tensor:
    """`X` rounded to bf16 up or down at random with mean `X` in fp32; values bf16 holds exactly stay, as do inf and nan."""
    X = X.float()
    # bf16 is the upper half of fp32: adding noise below it carries into it with the wanted probability.
    rounded = ((X.contiguous().view(torch.int32) + uniform16(X, seed)) & -(1 << 16)).view(torch.float32)
    return torch.where(X.isfinite(), rounded, X).to(torch.bfloat16)


def noisy(p: Tensor, rounding: str) -> bool:
    """Whether results enter `p` by chance."""
    return p.dtype == torch.bfloat16 and rounding == "stochastic"


def store_(p: Tensor, X: Tensor, rounding: str, seed: int | Tensor, lost: Tensor | None = None) -> None:
    """Write `X` into parameter `p` in `p`'s precision; "stochastic" applies to bf16, "kahan" to half precision.

    `lost` (p's shape and dtype) receives what rounding took away: the weight that is trained is p + lost.
    """
    if noisy(p, rounding):
        X = stochastic_bf16(X, seed)
    p.copy_(X)
    if lost is not None:
        lost.copy_(X - p)
