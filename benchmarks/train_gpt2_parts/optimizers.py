"""The three optimizers of a model, and how many numbers each of their rules trains."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import schatten
from benchmarks.train_gpt2_parts.settings import ADAMW, SCHATTEN
from schatten.lab import optimizers

BETAS = (0.9, 0.95)

Optimizers = list[torch.optim.Optimizer]


def build(name: str, model: nn.Module, lr: float, weight_decay: float) -> Optimizers:
    """The optimizers that together train `model` under this name; no decay on gains.

    Of torch.optim.Muon the matrices are those that `schatten.plan` finds hidden, as torch leaves the choice to its user.
    """
    if name in (SCHATTEN, ADAMW):
        lab_name = "muon" if name == SCHATTEN else optimizers.BASELINE
        return [optimizers.build(lab_name, model, lr=lr, weight_decay=weight_decay, betas=BETAS)]
    matrices, others = split(model)
    tables, gains = ([p for p in others if (p.ndim > 1) == wide] for wide in (True, False))
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return [muon, torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)]


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices, and all other parameters."""
    routes = {entry.name: entry.route for entry in schatten.plan(model)}
    parameters = dict(model.named_parameters())
    spectral, adamw = ([parameters[name] for name, route in routes.items() if route == own] for own in ("spectral", "adamw"))
    return spectral, adamw


def routes(name: str, model: nn.Module) -> dict[str, int]:
    """Route -> how many numbers it trains."""
    if name == ADAMW:
        return {"spectral": 0, "adamw": sum(p.numel() for p in model.parameters())}
    return {route: sum(p.numel() for p in own) for route, own in zip(("spectral", "adamw"), split(model), strict=True)}


def state_bytes(found: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors that the optimizers keep."""
    tensors = (value for opt in found for state in opt.state.values() for value in state.values())
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
