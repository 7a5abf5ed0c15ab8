"""Rounding of fp32 results into half-precision parameters.

An update below half a unit in the last place (0.2 % of a bf16 weight) is lost by rounding to nearest, every time. With
stochastic rounding a value goes up or down with the probability that makes its mean exact, so small steps and decay
act on average. The noise comes from a generator seeded by the step and the parameter: resumed runs repeat it, ranks
agree on it, and the user's random state is not touched.
"""

import torch
from torch import Tensor

ROUNDINGS = ("stochastic", "nearest")


def stochastic_bf16(X: Tensor, seed: int) -> Tensor:
    """`X` (fp32) rounded to bf16 up or down at random with mean `X`; values bf16 holds exactly stay, as do inf and nan."""
    generator = torch.Generator(X.device).manual_seed(seed)
    noise = torch.empty(X.shape, dtype=torch.int32, device=X.device).random_(0, 1 << 16, generator=generator)
    # bf16 is the upper half of fp32: adding noise below it carries into it with the wanted probability.
    rounded = ((X.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(X.isfinite(), rounded, X).to(torch.bfloat16)


def store_(p: Tensor, X: Tensor, rounding: str, seed: int) -> None:
    """Write `X` into parameter `p` in `p`'s precision; "stochastic" applies to bf16, other dtypes round to nearest."""
    if p.dtype == torch.bfloat16 and rounding == "stochastic":
        X = stochastic_bf16(X, seed)
    p.copy_(X)
