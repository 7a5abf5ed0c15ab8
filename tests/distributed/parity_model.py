"""A small GPT with everything that placements treat apart, and its batches.

A fused query, key and value, a bank of three experts, a convolution, a [1, width] and a (3, width) matrix, embeddings, a
head, norms and biases: on four ranks some shards are uneven and some empty.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

WIDTH, HEADS, HIDDEN, EXPERTS, VOCABULARY, LENGTH = 32, 4, 72, 3, 50, 8

# Sequences of a step, divisible by 1, 2, 3 and 4 ranks.
BATCH = 12

# Two matrices that a plan cannot know from their modules.
RULES = [("*gate.weight", "spectral"), ("*mix.weight", "spectral")]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


class Stem(nn.Module):
    """Embeddings, their convolution with the past, and their product, mixed and gated for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)
        self.mix = nn.Linear(WIDTH, 3, bias=False)
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.tokens(indices) + self.places(torch.arange(indices.shape[1]))
        past = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        # No softmax: adding to all three would be without a gradient but for rounding, which Muon makes as large as any.
        mixed = (self.mix(x).sigmoid().unsqueeze(-1) * torch.stack([x, past, x * past], dim=-2)).sum(-2)
        return mixed * (1 + self.gate(x).tanh())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        # Without a bias: a key's has no gradient but rounding, which AdamW would make as large as any.
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """All experts on every token, weighted by a router: gradients do not jump as they would with a choice of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.w1 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,ehd->bteh", x, whole(self.w1)))
        return torch.einsum("bteh,edh,bte->btd", hidden, whole(self.w2), self.router(x).softmax(-1))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Two blocks, the second with experts. Every parameter is drawn, biases too, as in the middle of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.blocks = nn.ModuleList([Block(MLP()), Block(Experts())])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        generator = torch.Generator().manual_seed(0)
        for name, p in self.named_parameters():
            scale = 0.1 if p.ndim == 1 else p.shape[-1] ** -0.5
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.data = center + scale * torch.randn(p.shape, generator=generator)

    def forward(self, batch: Tensor) -> Tensor:
        """The mean loss of predicting each next token of (sequences, LENGTH + 1)."""
        x = self.stem(batch[:, :-1])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), batch[:, 1:].flatten())


def loss(model: nn.Module, step: int, rank: int = 0, size: int = 1) -> Tensor:
    """The mean loss of one rank's share of a step's batch; the mean over ranks is that of the whole batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return model(batch[rank * BATCH // size : (rank + 1) * BATCH // size])
