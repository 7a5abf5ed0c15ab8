"""A GPT: GPT-2's architecture without biases, at any size."""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What attention keeps of the tokens that it has seen, written in place.
Cache = tuple[Tensor, ...]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; `width` must be a multiple of `heads`."""

    vocabulary: int
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    qk_norm: bool = False
    dropout: float = 0.0


class Attention(nn.Module):
    """Attention. Query, key and value are separate matrices: fused, they would be orthogonalised as one."""

    def __init__(self, config: GPTConfig, causal: bool = True) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = causal
        self.dropout = config.dropout
        self.query, self.key, self.value, self.output = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))
        head_width = config.width // config.heads
        self.query_norm, self.key_norm = (nn.RMSNorm(head_width) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v, is_causal=self.causal, dropout_p=dropout)
        return self.output(y.transpose(1, 2).flatten(-2))

    def cache(self, batch: int, context: int) -> Cache:
        """Room for the keys and values of `context` tokens, each (batch, heads, context, head width)."""
        rows = self.key.weight
        return tuple(rows.new_zeros(batch, self.heads, context, len(rows) // self.heads) for _ in range(2))

    def next(self, x: Tensor, cache: Cache, position: int) -> Tensor:
        """The output for the token at `position`, x (batch, 1, width), after those kept in `cache`, which then has it, too."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        for kept, new in zip(cache, (self.key_norm(k), v), strict=True):
            kept[:, :, position] = new[:, :, 0]
        keys, values = (kept[:, :, : position + 1] for kept in cache)
        y = F.scaled_dot_product_attention(self.query_norm(q), keys, values)
        return self.output(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm attention and a GELU network of four times the width."""

    def __init__(self, config: GPTConfig, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config, causal)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x + self.dropout(self.attention(self.attention_norm(x))))

    def next(self, x: Tensor, cache: Cache, position: int) -> Tensor:
        """`forward` for one token, without dropout."""
        return self.mix(x + self.attention.next(self.attention_norm(x), cache, position))

    def mix(self, x: Tensor) -> Tensor:
        """What follows attention, token by token."""
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class GPT(nn.Module):
    """GPT-2's architecture without biases, its token table tied to the head; initialised as nanoGPT's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)

    def logits(self, ids: Tensor) -> Tensor:
        """Scores of the next token, (batch, context) -> (batch, context, vocabulary)."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def _blocks(self) -> "list[Block]":
        return cast("list[Block]", list(self.blocks))  # a ModuleList does not say what it holds

    def caches(self, batch: int, context: int) -> list[Cache]:
        """What `next` keeps of `context` tokens, for every block."""
        return [block.attention.cache(batch, context) for block in self._blocks()]

    @torch.no_grad()
    def next(self, ids: Tensor, caches: list[Cache], position: int) -> Tensor:
        """Scores (batch, vocabulary) after the token `ids` (batch) at `position`, the earlier ones being in `caches`."""
        x = (self.tokens(ids) + self.positions.weight[position])[:, None]
        for block, cache in zip(self._blocks(), caches, strict=True):
            x = block.next(x, cache, position)
        return self.head(self.norm(x))[:, 0]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` given `ids`, both (batch, context)."""
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())
