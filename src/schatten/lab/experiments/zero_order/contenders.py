"""Who takes part: four rules that see losses alone and two that see gradients, with what is tuned of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from schatten import plan
from schatten.lab import optimizers
from schatten.lab.experiments.zero_order.random_direction import RandomDirection
from schatten.lab.tuning import Params, Space, Span
from schatten.presets import JaguarMuon, Muon

JAGUAR = "JAGUAR Muon"

# Ranges of the lr, 1.5 decades or more about what the quick problem likes.
LR: Mapping[str, Span] = {
    JAGUAR: Span(5e-4, 2e-2),
    "JAGUAR sign": Span(1e-3, 3e-2),
    "random direction": Span(3e-4, 1e-2),
    "sign of a random direction": Span(5e-4, 3e-2),
    "Muon": Span(3e-3, 0.1),
    "AdamW": Span(1e-3, 3e-2),
}


@dataclass(frozen=True)
class Contender:
    """`build(model, params)`, the `space` of its params, and whether it calls for losses without gradients."""

    name: str
    build: Callable[[nn.Module, Params], torch.optim.Optimizer]
    space: Space
    zero_order: bool


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _jaguar(model: nn.Module, params: Params) -> torch.optim.Optimizer:
    matrices = [p for p in trained(model) if p.ndim == 2]
    vectors = [p for p in trained(model) if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, *([{"params": vectors, "layout": "flat"}] if vectors else [])]
    return JaguarMuon(groups, **params)


def _jaguar_sign(model: nn.Module, params: Params) -> torch.optim.Optimizer:
    return JaguarMuon([{"params": trained(model), "layout": "flat"}], **params)


def _random(signed: bool) -> Callable[[nn.Module, Params], torch.optim.Optimizer]:
    return lambda model, params: RandomDirection(trained(model), signed=signed, **params)


def _first_order(name: str) -> Callable[[nn.Module, Params], torch.optim.Optimizer]:
    def build(model: nn.Module, params: Params) -> torch.optim.Optimizer:
        aux = {"lr": params["aux_lr"], "weight_decay": params["weight_decay"]} if "aux_lr" in params else None
        return optimizers.build(name, model, lr=params["lr"], weight_decay=params["weight_decay"], betas=(0.9, 0.95), aux=aux)

    return build


def _muon(model: nn.Module, params: Params) -> torch.optim.Optimizer:
    """The factors of LoRA are matrices like others, though a plan of the model would leave them to AdamW."""
    if partial(model):
        return Muon(trained(model), lr=params["lr"], weight_decay=params["weight_decay"])
    return _first_order("muon")(model, params)


def partial(model: nn.Module) -> bool:
    return len(trained(model)) < len(list(model.parameters()))


def contenders(model: nn.Module) -> tuple[Contender, ...]:
    """All six, with a second lr for Muon's AdamW where `model` has parameters for it."""
    momentum, decay = [0.0, 0.9], [0.0, 0.1]
    beside = not partial(model) and any(entry.route == "adamw" for entry in plan(model))
    aux: Mapping[str, Span] = {"aux_lr": Span(3e-4, 3e-2)} if beside else {}
    spaces: Mapping[str, tuple[Callable[[nn.Module, Params], torch.optim.Optimizer], Space]] = {
        JAGUAR: (_jaguar, {"momentum": momentum}),
        "JAGUAR sign": (_jaguar_sign, {"momentum": momentum}),
        "random direction": (_random(False), {}),
        "sign of a random direction": (_random(True), {}),
        "Muon": (_muon, {**aux, "weight_decay": decay}),
        "AdamW": (_first_order("adamw"), {"weight_decay": decay}),
    }
    first_order = ("Muon", "AdamW")
    return tuple(
        Contender(name, build, {"lr": LR[name], **space}, name not in first_order) for name, (build, space) in spaces.items()
    )
