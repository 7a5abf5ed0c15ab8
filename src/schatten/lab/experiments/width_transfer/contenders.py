"""The rules whose best learning rate is followed across widths."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import schatten
from schatten.solvers import polynomial

ADAMW_BETAS = (0.9, 0.95)

# Muon++'s own accuracy for all, so that the rescaling has only its own effect.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Contender:
    """`spectral` start or torch's; `shift` is the derived change of the best log2 lr per doubling of the width, from .. to.

    `start_at` is the exponent of the first lr tried, found in trials at width 64.
    """

    name: str
    spectral: bool
    shift: tuple[float, float]
    start_at: int
    scale: str = ""
    rescaled: bool = False

    def start(self, model: nn.Module) -> None:
        if self.spectral:
            schatten.init_spectral_(model)

    def optimizer(self, lr: float, weight_decay: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        """For a model of matrices alone."""
        if self.rescaled:
            return lambda model: schatten.MuonPlusPlus(model, lr=lr, weight_decay=weight_decay)
        if self.scale:
            solver = polynomial(tol=TOLERANCE)
            return lambda model: schatten.Muon(model, lr=lr, weight_decay=weight_decay, scale=self.scale, solver=solver)
        return lambda model: torch.optim.AdamW(
            model.parameters(), lr=lr, betas=ADAMW_BETAS, weight_decay=weight_decay, fused=True
        )


FULL, UPDATES = "Muon++", "Muon, mup"
START_ONLY, RESCALED_ONLY = "Muon, mup, spectral start", "Muon, mup, rescaled"

CONTENDERS = (
    Contender(FULL, True, (0, 0), -3, rescaled=True),
    Contender(UPDATES, False, (0, 0), -3, scale="mup"),
    Contender("Muon, keller", False, (-0.5, 0), -4, scale="keller"),
    Contender("Muon, adamw-rms", False, (-1, -0.5), -5, scale="adamw-rms"),
    Contender("AdamW", False, (-1, -0.5), -5),
)

# Parts of Muon++ alone, beside Muon++ and the mup scale.
ABLATED = (
    Contender(START_ONLY, True, (0, 0), -3, scale="mup"),
    Contender(RESCALED_ONLY, False, (0, 0), -3, rescaled=True),
)
