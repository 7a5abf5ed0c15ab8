"""Multi-head latent attention (DeepSeek-V2, 2405.04434): keys and values are made of one short vector per token.

    c = norm(D x),  r = rotate(R x)                       what is kept of a token: latent + rotary numbers
    q_h = [Q_h x, rotate(P_h x)],  k_h = [K_h c, r],  v_h = V_h c
    y = O [softmax(q_h k_h^T / sqrt(head + rotary)) v_h]_h

Full attention keeps k_h and v_h of all heads, 2 heads head numbers. Positions enter through `rotary` dimensions alone, which
all heads share: rotated, K_h c could not be made of c after the fact.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schatten.lab.models.gpt import Cache

# The slowest of the rotations turns once in about 2 pi times so many tokens (Su et al. 2021).
BASE = 10_000.0


@dataclass(frozen=True)
class LatentAttentionConfig:
    """`heads` heads of `head` dimensions each for content, an even number `rotary` for positions, and `latent` numbers kept."""

    width: int
    heads: int
    head: int
    latent: int
    rotary: int


class LatentAttention(nn.Module):
    """Causal latent attention, (batch, context, width) -> the same. Every operand has a matrix of its own.

    Raises ValueError for an odd number of rotary dimensions.
    """

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        if config.rotary % 2:
            raise ValueError(f"rotary must be even, for pairs to be rotated, got {config.rotary}.")
        self.config = config
        heads = config.heads * config.head
        self.query = nn.Linear(config.width, heads, bias=False)
        self.query_rotary = nn.Linear(config.width, config.heads * config.rotary, bias=False)
        self.latent = nn.Linear(config.width, config.latent, bias=False)
        self.latent_norm = nn.RMSNorm(config.latent)
        self.key_rotary = nn.Linear(config.width, config.rotary, bias=False)
        self.key = nn.Linear(config.latent, heads, bias=False)
        self.value = nn.Linear(config.latent, heads, bias=False)
        self.output = nn.Linear(heads, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        latent, rotated = self._kept(x, 0)
        key = torch.cat([self._heads(self.key(latent)), rotated[:, None].expand(-1, self.config.heads, -1, -1)], -1)
        query = torch.cat([self._heads(self.query(x)), rotate(self._heads(self.query_rotary(x)))], -1)
        # Its default scale is 1 / sqrt(head + rotary), the length of a query.
        y = F.scaled_dot_product_attention(query, key, self._heads(self.value(latent)), is_causal=True)
        return self.output(y.transpose(1, 2).flatten(-2))

    def cache(self, batch: int, context: int) -> Cache:
        """Room for latents and rotated keys of `context` tokens: (batch, context, latent) and (batch, context, rotary)."""
        return tuple(self.key.weight.new_zeros(batch, context, n) for n in (self.config.latent, self.config.rotary))

    def next(self, x: Tensor, cache: Cache, position: int) -> Tensor:
        """The output for the token at `position`, x (batch, 1, width), after those kept in `cache`, which then has it, too.

        No key or value is ever formed: K_h moves to the query, V_h behind the average,
            q_h k_h^T = (K_h^T Q_h x) c^T + rotate(P_h x) r^T,   y_h = V_h (attention c).
        """
        config = self.config
        for kept, new in zip(cache, self._kept(x, position), strict=True):
            kept[:, position] = new[:, 0]
        latent, rotated = (kept[:, : position + 1] for kept in cache)
        K, V = (p.weight.unflatten(0, (config.heads, config.head)) for p in (self.key, self.value))
        query = torch.einsum("bhtd,hdl->bhtl", self._heads(self.query(x)), K)[:, :, 0]
        turned = rotate(self._heads(self.query_rotary(x)), position)[:, :, 0]
        scores = (query @ latent.mT + turned @ rotated.mT) * (config.head + config.rotary) ** -0.5
        mixed = scores.softmax(-1) @ latent
        return self.output(torch.einsum("bhl,hdl->bhd", mixed, V).flatten(-2))[:, None]

    def _kept(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """What a cache holds of tokens at positions `start` and on."""
        return self.latent_norm(self.latent(x)), rotate(self.key_rotary(x), start)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)


def rotate(x: Tensor, start: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021): entries i and i + n/2 of x (..., context, n) are turned by position * BASE^(-2i/n)."""
    half = x.shape[-1] // 2
    frequency = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
