"""The optimizers whose critical batches are compared."""

from dataclasses import dataclass

import torch
from torch import nn

import schatten

MOMENTUM = 0.95
# Beside it, for the dependence on beta: (1 - beta) is four times as large.
LOW_MOMENTUM = 0.8
ADAMW_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Variant:
    """Muon with Nesterov's look-ahead and decay on or off; `fixed` if it is measured with one lr for all batches too."""

    name: str
    nesterov: bool = True
    decay: bool = True
    momentum: float = MOMENTUM
    fixed: bool = True

    def build(self, model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """For a model of matrices alone."""
        decay = weight_decay if self.decay else 0.0
        if self.name == ADAMW:
            return torch.optim.AdamW(model.parameters(), lr=lr, betas=ADAMW_BETAS, weight_decay=decay, fused=True)
        return schatten.Muon(model, lr=lr, weight_decay=decay, momentum=self.momentum, nesterov=self.nesterov)


MUON, NO_DECAY, NO_NESTEROV, NEITHER = "Muon", "Muon, no decay", "Muon, no Nesterov", "Muon, neither"
LOW_BETA, ADAMW = f"Muon, neither, beta {LOW_MOMENTUM}", "AdamW"

VARIANTS = (
    Variant(MUON),
    Variant(NO_DECAY, decay=False),
    Variant(NO_NESTEROV, nesterov=False, fixed=False),
    Variant(NEITHER, nesterov=False, decay=False, fixed=False),
    Variant(LOW_BETA, nesterov=False, decay=False, momentum=LOW_MOMENTUM, fixed=False),
    Variant(ADAMW),
)
