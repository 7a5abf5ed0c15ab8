"""Optimizers a comparison can name: torch's AdamW and every preset of the library, on equal terms.

Equal terms: one lr and weight decay for a whole model, no decay on norms and biases, the same betas for AdamW wherever
it is used.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import schatten
from schatten.lab.errors import InputError

BASELINE = "adamw"


def known() -> dict[str, str]:
    """Names and first docstring lines of all optimizers."""
    summaries = {BASELINE: "torch.optim.AdamW, the baseline."}
    for name in schatten.presets.__all__:
        preset = getattr(schatten.presets, name)
        summaries[name.lower()] = (inspect.getdoc(preset) or "").splitlines()[0]
    return summaries


def check(name: str) -> None:
    """Raise InputError for an unknown optimizer."""
    if name not in known():
        raise InputError(f"--optimizers has no {name!r}: known are {', '.join(known())}.")


def build(name: str, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer `name` for all of `model`."""
    check(name)
    plan = schatten.plan(model)
    if name == BASELINE:
        params = dict(model.named_parameters())
        decayed = [p for p in params.values() if p.ndim >= 2]
        vectors = [p for p in params.values() if p.ndim < 2]
        groups: list[Mapping[str, Any]] = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([dict(g) for g in groups], lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    preset = {n.lower(): getattr(schatten.presets, n) for n in schatten.presets.__all__}[name]
    rules = [(entry.name, "adamw", {"weight_decay": 0.0}) for entry in plan if len(entry.shape) < 2]
    return preset(model, lr=lr, weight_decay=weight_decay, adamw={"betas": betas}, rules=rules)


def bounds(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Parameter name -> the radius c / lambda that decay keeps its spectral norm within, for spectral parameters."""
    found = {}
    if isinstance(optimizer, schatten.SpectralOptimizer):
        for group in optimizer.param_groups:
            if group["algorithm"] == "spectral" and group["weight_decay"] > 0:
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    found[name] = optimizer.rule(group).scale.factor(p.shape[0], p[0].numel()) / group["weight_decay"]
    return found
