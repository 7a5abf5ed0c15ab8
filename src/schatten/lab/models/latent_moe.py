"""A decoder of DeepSeek-V3's kind (2412.19437): latent attention and a mixture of experts in every block, at any size."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schatten.lab.models.gpt import Cache
from schatten.lab.models.latent_attention import LatentAttention, LatentAttentionConfig
from schatten.lab.models.mixture import Mixture, MixtureConfig


@dataclass(frozen=True)
class LatentMoEConfig:
    """Sizes. `latent` + `rotary` numbers are cached for a token and a layer; `active` of `experts` and a shared one see it.

    `heads` must divide `width`, `rotary` must be even; `hidden` units in an expert.
    """

    vocabulary: int
    layers: int = 4
    heads: int = 4
    width: int = 128
    latent: int = 32
    rotary: int = 16
    experts: int = 8
    active: int = 2
    hidden: int = 128
    shared: int = 1
    balance: float = 1e-3

    @property
    def attention(self) -> LatentAttentionConfig:
        return LatentAttentionConfig(self.width, self.heads, self.width // self.heads, self.latent, self.rotary)

    @property
    def mixture(self) -> MixtureConfig:
        return MixtureConfig(self.width, self.experts, self.active, self.hidden, self.shared, self.balance)


class LatentBlock(nn.Module):
    """Pre-norm latent attention and mixture."""

    def __init__(self, config: LatentMoEConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = LatentAttention(config.attention)
        self.mixture_norm = nn.RMSNorm(config.width)
        self.mixture = Mixture(config.mixture)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x + self.attention(self.attention_norm(x)))

    def next(self, x: Tensor, cache: Cache, position: int) -> Tensor:
        """`forward` for one token."""
        return self.mix(x + self.attention.next(self.attention_norm(x), cache, position))

    def mix(self, x: Tensor) -> Tensor:
        """What follows attention, token by token."""
        return x + self.mixture(self.mixture_norm(x))


class LatentMoE(nn.Module):
    """Token ids -> scores of the next token; tied, initialised and called as `GPT`, at contexts of any length."""

    def __init__(self, config: LatentMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(LatentBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                residual = name.endswith(("output.weight", "down.weight", "experts.down"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)

    def logits(self, ids: Tensor) -> Tensor:
        """(batch, context) -> (batch, context, vocabulary)."""
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` given `ids`, both (batch, context)."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())

    def _blocks(self) -> "list[LatentBlock]":
        return cast("list[LatentBlock]", list(self.blocks))  # a ModuleList does not say what it holds

    def caches(self, batch: int, context: int) -> list[Cache]:
        """What `next` keeps of `context` tokens, for every block."""
        return [block.attention.cache(batch, context) for block in self._blocks()]

    @torch.no_grad()
    def next(self, ids: Tensor, caches: list[Cache], position: int) -> Tensor:
        """Scores (batch, vocabulary) after the token `ids` (batch) at `position`, the earlier ones being in `caches`."""
        x = self.tokens(ids)[:, None]
        for block, cache in zip(self._blocks(), caches, strict=True):
            x = block.next(x, cache, position)
        return self.head(self.norm(x))[:, 0]

    def active_parameters(self) -> int:
        """Parameters that a token meets: all but those of the experts that do not see it."""
        config = self.config
        banks = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return sum(p.numel() for p in self.parameters()) - banks * (config.experts - config.active) // config.experts
