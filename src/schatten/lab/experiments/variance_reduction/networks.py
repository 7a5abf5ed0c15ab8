"""Muon and its variance-reduced forms on networks at small, noisy batches: the contenders and two tasks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import schatten
from schatten.lab import images
from schatten.lab.contest import Contender
from schatten.lab.errors import named
from schatten.lab.models import MLP
from schatten.lab.tasks import Classification
from schatten.lab.tuning import Params, Span

BETAS = (0.9, 0.95)

# Learning rates in AdamW's units; of the correction the published value and those for CIFAR-10 and beyond.
LR = {"lr": Span(1e-3, 1e-1), "aux_lr": Span(3e-4, 3e-2)}
GAMMAS = [0.01, 0.025, 0.05, 0.1]

# Preset, its options, and whether gamma is tuned.
RULES: Mapping[str, tuple[type[schatten.SpectralOptimizer], dict[str, Any], bool]] = {
    "Muon": (schatten.Muon, {}, False),
    "MVR1": (schatten.MuonMVR, {}, True),
    "MVR2": (schatten.MuonMVR, {"exact": True}, True),
    "STORM": (schatten.MuonMVR, {"exact": True, "gamma": 1.0, "clip": False}, False),
    "MARS-M": (schatten.MARSM, {}, True),
}


def build(name: str, model: nn.Module, params: Params) -> torch.optim.Optimizer:
    """The rule `name` with its published momentum 0.95 and decay 0.1, which all of them share with Moonlight's Muon."""
    preset, options, _ = RULES[name]
    given = {"gamma": params["gamma"]} if "gamma" in params else {}
    return preset(model, lr=params["lr"], adamw={"lr": params["aux_lr"], "betas": BETAS}, **{**options, **given})


def contender(name: str, space: Mapping[str, Any] | None = None) -> Contender:
    """`name` with its own space, or with all params given as lists of one."""
    _, options, tuned = RULES[name]
    exact = bool(options.get("exact"))
    own = {**LR, **({"gamma": GAMMAS} if tuned else {})}
    build_it = lambda model, params: build(name, model, params)  # noqa: E731
    return Contender(name, build_it, own if space is None else space, closure=exact, gradients=2 if exact else 1)


def image_task(source: str, width: int) -> Classification:
    """A perceptron of one hidden layer more than none: inputs, two hidden layers of `width`, classes."""
    with named("--images"):
        found = images.load(source)
    channels, height, across = found.shape
    return Classification(found, lambda: MLP((channels * height * across, width, width, found.classes)))
