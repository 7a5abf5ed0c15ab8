"""What tests of Monitor share: small models with all that could be disturbed, a quantity that keeps what it is given."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import nn

import schatten
from schatten.monitor import known

needs_loss = [name for name, q in known().items() if q.needs & {"hessian", "losses"}]
of_one_matrix = ["constraint", "gradient", "update", "momentum"]
of_tensors = [name for name in known() if name not in needs_loss]


class Fused(nn.Module):
    """Fused query, key and value with heads, batch norm and dropout: pieces, buffers and random numbers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.drop(self.norm(y.mean(1))))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.up(x.mean(1)))))


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 3, 8, generator=generator).to(dtype), torch.randint(0, 4, (6,), generator=generator)


def loss_of(model, dtype=torch.float32):
    x, y = batch(dtype)
    return lambda: nn.functional.cross_entropy(model(x).float(), y)


def muon(model):
    return schatten.Muon(model, lr=0.05, weight_decay=0.1)


def adamw_too(model):
    return schatten.Muon(model, lr=0.05, rules=[("*head*", "adamw")])


def in_bytes(model):
    return schatten.Muon(model, lr=0.05, weight_decay=0.1, state_dtype="int8")


# Estimates from few products: what is tested is that training does not notice.
SHORT = {"probes": 2, "patterns": 2, "iterations": 3, "ascents": 2}
FEW_STEPS = {"hessian_rank": 3, "smoothness": 3, "weighted_smoothness": 12}

# Where names tell of no attention.
ATTENTION = {"query": r"up\.weight", "key": r"up\.weight"}


def small(name, model):
    quantity = known()[name]
    own = {field.name for field in fields(quantity)}
    special = ATTENTION if name == "attention" and model is Plain else {}
    steps = {"steps": FEW_STEPS[name]} if name in FEW_STEPS else {}
    return quantity(**{key: n for key, n in SHORT.items() if key in own}, **steps, **special)


@dataclass
class Reads:
    """Keeps the blocks it is called with."""

    name: ClassVar[str] = "reads"
    scope: ClassVar[str] = "matrix"
    columns: ClassVar[dict[str, str]] = {"norm": "of the weight"}
    cost: ClassVar[str] = "none"

    needs: frozenset[str] = frozenset()

    def __post_init__(self):
        self.blocks = []

    def __call__(self, of):
        # Copies, as the step goes on to write to what these show.
        names = ("weight", "gradient", "momentum", "update")
        own = {name: t.clone() for name in names if (t := getattr(of, name)) is not None}
        self.blocks.append(replace(of, **own))
        return {"norm": torch.linalg.matrix_norm(of.weight)}


def reading(*needs):
    return Reads(frozenset(needs))


def one_matrix(lr=0.1, weight_decay=0.5, make=schatten.Muon, **options):
    W = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    return W, make([("W", W)], lr=lr, weight_decay=weight_decay, **options)


def stepped(opt, W, times):
    for _ in range(times):
        W.grad = torch.randn_like(W)
        opt.step()
