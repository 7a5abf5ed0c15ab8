"""A mixture of experts as DeepSeek-V3's (2412.19437): a shared expert, and of many others the few that a router chooses.

    s = sigmoid(R x),  chosen = top-k of s + b,  y = shared(x) + sum over chosen e of s_e / (sum of chosen s) expert_e(x)
    expert(x) = D (silu(G x) * U x)

b balances the load without a term in the loss (2408.15664): after each training step it rises by `balance` for experts
chosen less than the average and falls for the others. It chooses, but does not weigh.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MixtureConfig:
    """`experts` experts of `hidden` units, of which `active` see a token, and `shared` times as many units that see all."""

    width: int
    experts: int
    active: int
    hidden: int
    shared: int = 1
    balance: float = 1e-3


class Experts(nn.Module):
    """Banks of matrices, one per expert: gate and up (experts, hidden, width), down (experts, width, hidden)."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        self.gate = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))
        self.up = nn.Parameter(torch.empty(config.experts, config.hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, config.hidden))
        for bank in (self.gate, self.up, self.down):
            nn.init.normal_(bank, std=0.02)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """The first counts[0] rows of x (tokens, width) through expert 0, the next counts[1] through 1, and so on."""
        # Unbound once: a bank indexed per expert would get a gradient of the whole bank from each.
        banks = zip(*(bank.unbind() for bank in (self.gate, self.up, self.down)), strict=True)
        parts = zip(x.split(counts), banks, strict=True)
        return torch.cat(
            [F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down) for part, (gate, up, down) in parts]
        )


class GatedMLP(nn.Module):
    """D (silu(G x) * U x), the network that each expert is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """(batch, context, width) -> the same. Raises ValueError for more active experts than there are."""

    bias: Tensor

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        if not 1 <= config.active <= config.experts:
            raise ValueError(f"active must be 1 .. experts = {config.experts}, got {config.active}.")
        self.config = config
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.register_buffer("bias", torch.zeros(config.experts))
        self.experts = Experts(config)
        self.shared = GatedMLP(config.width, config.shared * config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        chosen, weights = self.route(tokens)
        # Tokens in the order of their experts; `back` is where each token's copies went.
        order = chosen.flatten().argsort(stable=True)
        back = order.argsort().unflatten(0, chosen.shape)
        counts = chosen.flatten().bincount(minlength=self.config.experts)
        out = self.experts(tokens[order // self.config.active], counts.tolist())
        routed = (out[back] * weights[..., None]).sum(1)
        if self.training and torch.is_grad_enabled():
            self.bias += self.config.balance * (counts.float().mean() - counts).sign()
        return self.shared(x) + routed.unflatten(0, x.shape[:-1])

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts chosen for tokens (n, width) and their weights, which sum to 1: both (n, active)."""
        scores = self.router(tokens).sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.config.active, sorted=False).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True)
