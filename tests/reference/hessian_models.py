"""Small models with everything that makes a Hessian hard, and the explicit Hessian of a loss to compare products with."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH, BATCH = 5, 4, 3, 6


class Hard(nn.Module):
    """Tied embedding and head, attention, dropout, batch norm, a parameter that nothing uses, one that is added linearly."""

    def __init__(self, fused: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(dropout)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.linear = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.fused = fused

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        else:
            scores = (q @ k.mT / WIDTH**0.5).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
            x = x + self.out(scores.softmax(-1) @ v)
        x = self.norm(self.drop(x.tanh()).flatten(0, 1)).unflatten(0, (-1, LENGTH))
        return self.head(x)


def hard(dtype: torch.dtype = torch.float64, **options: bool | float) -> Hard:
    torch.manual_seed(1)
    return Hard(**options).to(dtype)  # type: ignore[arg-type]


def tokens(seed: int, batch: int = BATCH) -> Tensor:
    return torch.randint(VOCABULARY, (batch, LENGTH + 1), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token; where the model has `linear`, its sum too."""
    value = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1).to(torch.float64), batch[:, 1:].flatten())
    inner = getattr(model, "module", model)
    return value + inner.linear.sum() if hasattr(inner, "linear") else value


def explicit(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Hessian of a loss, (N, N), one row of second derivatives after the other."""
    slopes = torch.autograd.grad(loss(), params, create_graph=True, materialize_grads=True)
    rows = []
    for slope in torch.cat([s.reshape(-1) for s in slopes]):
        if slope.requires_grad:
            row = torch.autograd.grad(slope, params, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([r.reshape(-1) for r in row]))
        else:
            rows.append(torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype))
    return torch.stack(rows)


def functional(model: nn.Module, batch: Tensor) -> Tensor:
    """The same by torch.autograd.functional.hessian of a function of the parameters, in the order of `parameters()`."""
    names, params = zip(*model.named_parameters(), strict=True)
    shapes = [p.shape for p in params]

    def f(vector: Tensor) -> Tensor:
        pieces = vector.split([s.numel() for s in shapes])
        own = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        logits = torch.func.functional_call(model, own, batch[:, :-1])
        value = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return value + own["linear"].sum() if "linear" in own else value

    found = torch.autograd.functional.hessian(f, torch.cat([p.detach().reshape(-1) for p in params]))
    assert isinstance(found, Tensor)
    return found


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
