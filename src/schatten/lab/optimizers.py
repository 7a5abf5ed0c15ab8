"""Optimizers a comparison can name: torch's AdamW, every preset of the library and their published variants, on equal terms.

Equal terms: one lr and weight decay for a whole model, no decay on norms and biases, the same betas for AdamW wherever
it is used. With `weight_decay=None` each has its own documented decay instead.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import schatten
from schatten import maps
from schatten.lab.errors import InputError
from schatten.presets.lion_k import reads_any_tensor

BASELINE = "adamw"

# The baseline's own lr and decay, nanoGPT's.
BASELINE_LR, BASELINE_DECAY = 1e-3, 0.1

# Their rule has no decay to choose: Hyperball fixes norms, Scion's is 1.
OWN_DECAY = (schatten.Hyperball, schatten.Scion)


@dataclass(frozen=True)
class Contestant:
    """A preset with options, under the name a comparison calls it by."""

    preset: type[schatten.SpectralOptimizer]
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _sgd(p: float, name: str) -> Contestant:
    return Contestant(schatten.SpectralSGD, f"{name}: U S^{p:g} V^T of SGD's momentum, SpectralSGD(p={p:g}).", {"p": p})


def _adam(p: float, name: str) -> Contestant:
    return Contestant(schatten.SpectralAdam, f"{name}: U S^{p:g} V^T of Adam's ratio, SpectralAdam(p={p:g}).", {"p": p})


def _lion_k(summary: str, K: maps.Map, beta: float) -> Contestant:
    return Contestant(schatten.LionK, summary, {"map": K, "betas": (beta, beta), "decay": "explicit"})


VARIANTS = {
    "msgd": _sgd(1, "mSGD"),
    "msgds": _sgd(0.5, "mSGDS"),
    "msgdq": _sgd(0.25, "mSGDQ"),
    "msgdz": _sgd(0, "mSGDZ"),
    "adam": _adam(1, "Adam"),
    "adams": _adam(0.5, "AdamS"),
    "adamq": _adam(0.25, "AdamQ"),
    "adamz": _adam(0, "AdamZ"),
    "signum": _lion_k("Signum: the sign of the momentum, LionK(maps.L1()) with equal betas.", maps.L1(), 0.9),
    "nsgd": _lion_k("Normalised SGD with momentum, LionK(maps.Frobenius()) with equal betas.", maps.Frobenius(), 0.9),
    "ffanion": Contestant(schatten.Fanion, "F-Fanion-5: five leading directions and the Frobenius direction.", {"alpha": 0.5}),
    "muonmvr2": Contestant(schatten.MuonMVR, "Muon-MVR2: a second gradient at the old weights.", {"exact": True}),
    "storm": Contestant(
        schatten.MuonMVR, "STORM: MVR2 with gamma 1 and no clip.", {"exact": True, "gamma": 1.0, "clip": False}
    ),
    "trustregiondecay": Contestant(
        schatten.TrustRegion, "Kovalev's trust region with lambda/2 ||W||^2 in the step.", {"weight_decay": 0.1}
    ),
}

# What the project's source documents name.
SOURCE = (
    *("lionk", "lion", "signum", "nsgd", "muon"),
    *("msgd", "msgds", "msgdq", "msgdz", "adam", "adams", "adamq", "adamz"),
    *("fanion", "ffanion", "neon", "fmuon", "smuon"),
    *("muonmvr", "muonmvr2", "storm", "marsm"),
    *("ef21muon", "jaguarmuon", "muonplusplus", "trustregion", "trustregiondecay", "simplifiedmuon"),
)


def contestants() -> dict[str, Contestant]:
    """Every preset under its name in lower case, then the variants."""
    presets = {name.lower(): getattr(schatten.presets, name) for name in schatten.presets.__all__}
    plain = {name: Contestant(preset, (inspect.getdoc(preset) or "").splitlines()[0]) for name, preset in presets.items()}
    return {**plain, **VARIANTS}


def known() -> dict[str, str]:
    """Names and one line on each."""
    return {BASELINE: "torch.optim.AdamW, the baseline.", **{name: c.summary for name, c in contestants().items()}}


def named(names: str) -> tuple[str, ...]:
    """The optimizers of a comma-separated list, where `all` and `all-source` stand for many."""
    found: list[str] = []
    for name in filter(None, (part.strip().lower() for part in names.split(","))):
        found += {"all": list(known()), "all-source": list(SOURCE)}.get(name, [name])
    return tuple(found)


def check(name: str) -> None:
    """Raise InputError for an unknown optimizer."""
    if name not in known():
        raise InputError(f"--optimizers has no {name!r}: known are {', '.join(known())}, all-source and all.")


def default_lr(name: str) -> float:
    """The documented default learning rate."""
    check(name)
    if name == BASELINE:
        return BASELINE_LR
    contestant = contestants()[name]
    opt = contestant.preset([nn.Parameter(torch.zeros(2, 2))], **contestant.options)
    return float(opt.param_groups[0]["lr"])


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float | None,
    betas: tuple[float, float],
    aux: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `name` for all of `model`; `weight_decay=None` is its own.

    `aux` has the lr, weight_decay or eps of the AdamW that embeddings, heads and vectors get beside a spectral rule, where
    they differ from the matrices'; torch's AdamW, which is one rule for all, takes none.
    """
    check(name)
    if name == BASELINE:
        params = dict(model.named_parameters())
        decayed = [p for p in params.values() if p.ndim >= 2]
        vectors = [p for p in params.values() if p.ndim < 2]
        groups: list[Mapping[str, Any]] = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
        decay = BASELINE_DECAY if weight_decay is None else weight_decay
        return torch.optim.AdamW([dict(g) for g in groups], lr=lr, betas=betas, weight_decay=decay, fused=True)
    contestant = contestants()[name]
    options = dict(contestant.options)
    if weight_decay is not None and contestant.preset not in OWN_DECAY:
        options["weight_decay"] = weight_decay
    others = contestant.preset.others == "spectral" or ("map" in options and reads_any_tensor(options["map"]))
    route, extra = ("spectral", {"layout": "flat"}) if others else ("adamw", {})
    vectors_rule = {"weight_decay": 0.0, **extra}
    rules = [(entry.name, route, vectors_rule) for entry in schatten.plan(model) if len(entry.shape) < 2]
    return contestant.preset(model, lr=lr, adamw={"betas": betas, **(aux or {})}, rules=rules, **options)


def evaluates(name: str) -> bool:
    """Whether a step of the optimizer calls the closure that computes the loss, once or more, by its own rule."""
    contestant = contestants().get(name)
    return contestant is not None and (contestant.preset.needs_closure or bool(contestant.options.get("exact")))


def moves_whole_weights(name: str) -> bool:
    """Whether the optimizer estimates gradients from losses at moved weights, which it must hold whole."""
    contestant = contestants().get(name)
    return contestant is not None and contestant.preset.needs_closure


def bounds(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Parameter name -> the radius c / lambda that decay keeps its spectral norm within, for rules that imply one."""
    found = {}
    if isinstance(optimizer, schatten.SpectralOptimizer):
        for group in optimizer.param_groups:
            if group["algorithm"] == "spectral" and group["weight_decay"] > 0:
                rule = optimizer.rule(group)
                factor = rule.map.c if isinstance(rule.map, maps.Scaled) else 1.0
                inner = rule.map.map if isinstance(rule.map, maps.Scaled) else rule.map
                if isinstance(inner, maps.Nuclear) and isinstance(rule.retraction, schatten.retractions.DecoupledDecay):
                    for name, p in zip(group["param_names"], group["params"], strict=True):
                        c = factor * rule.scale.factor(p.shape[0], p.shape[1:].numel())
                        found[name] = c / group["weight_decay"]
    return found
