"""Networks under Muon, with the singular values of their hidden matrices, and the GPT under AdamW."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import schatten
from schatten.diagnostics.constraint import steps_to_enter
from schatten.diagnostics.singular_values import singular_values
from schatten.lab import data, images
from schatten.lab.errors import InputError, named
from schatten.lab.fit import Loop, fit
from schatten.lab.models import GPT, MLP, GPTConfig, ResNet, ResNetConfig
from schatten.lab.schedule import lr_factor
from schatten.lab.tasks import Classification, NextToken, Task
from schatten.layout import pieces
from schatten.solvers import Solver, newton_schulz, polynomial, svd

if TYPE_CHECKING:
    from schatten.lab.experiments.spectral_ball import Config

# How far beyond 1 the singular values of a direction may lie: the tolerance of the default polynomial, and what five of Keller
# Jordan's quintics reach for small singular values (2602.04669).
OVERSHOOT = {"exact": 0.0, "polynomial": 0.16, "keller": 0.203}

# The ball is reached in the limit only: within 1 % of the radius counts as inside.
MARGIN = 0.01

AUX = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.95)}
ADAMW_DECAY = 0.1

# Whose 0.02 of nanoGPT the GPT's start has.
NANOGPT_WIDTH = 768

# Of more singular values a picture shows as many quantiles.
SHOWN = 400

PARTS = ("query", "key", "value")


def solver(name: str) -> Solver:
    """The solver of `name`. Raises InputError for another."""
    built = {"exact": svd, "polynomial": polynomial, "keller": lambda: newton_schulz("keller")}
    if name not in built:
        raise InputError(f"--solvers has no {name!r}: known are {', '.join(built)}.")
    return built[name]()


def tasks(config: "Config") -> dict[str, Task]:
    """The tasks of `config.networks`. Raises InputError for a network or data that are not there."""
    found: dict[str, Task] = {}
    for name in config.networks:
        if name == "gpt":
            with named("--text"):
                corpus = data.load(config.text, "byte", config.context)
            shape = GPTConfig(corpus.vocabulary, config.context, config.layers, config.heads, config.width)
            found[name] = NextToken(corpus, config.context, lambda shape=shape: GPT(shape))
            continue
        pictures = images.load(config.data)
        if name == "mlp":
            widths = (math.prod(pictures.shape), *config.hidden, pictures.classes)
            found[name] = Classification(pictures, lambda widths=widths: MLP(widths))
        elif name == "resnet":
            sizes = ResNetConfig(pictures.shape[0], pictures.classes, config.widths, config.blocks)
            found[name] = Classification(pictures, lambda sizes=sizes: ResNet(sizes))
        else:
            raise InputError(f"--networks has no {name!r}: known are mlp, resnet and gpt.")
    return found


def trainings(config: "Config") -> Iterator[tuple[str, str, float]]:
    """(network, solver, decay) of every training with Muon; the plateau of Keller's quintics is measured on the MLP alone."""
    for name in config.solvers:
        solver(name)
    for network in config.networks:
        for name in config.solvers:
            for decay in config.decays if name != "keller" or network == "mlp" else ():
                yield network, name, decay


def loop(config: "Config", task: Task) -> Loop:
    batch = config.windows if isinstance(task, NextToken) else config.batch
    return Loop(config.steps, batch, warmup=config.steps // 20, schedule="linear", clip=1.0, mixed_precision=config.precision)


def widened(model: nn.Module) -> None:
    """Gives a GPT's hidden matrices the spectral norms that they have at width 768."""
    if isinstance(model, GPT):
        for matrix in model.blocks.parameters():
            if matrix.ndim == 2:
                matrix.data *= math.sqrt(NANOGPT_WIDTH / model.config.width)


def hidden(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The singular values, descending, of every matrix that a spectral rule trains, by its parameter's name."""
    return {
        name + (f".{i}" if i else ""): singular_values(piece.of(p.detach())).flatten().sort(descending=True).values
        for group in optimizer.param_groups
        if group.get("algorithm") == "spectral"
        for name, p in zip(group["param_names"], group["params"], strict=True)
        for i, piece in enumerate(pieces(group["layout"], p.shape))
    }


@dataclass
class Watch:
    """Follows the matrices of a training: the largest singular value against 1/lambda, and against what the rate allows."""

    decay: float
    overshoot: float
    every: int
    snapshots: tuple[int, ...]
    step: list[int] = field(default_factory=list)
    # Over matrices the largest ||W||_op lambda, and the largest excess over what is allowed, in units of the radius.
    ratio: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)
    # Of all singular values those above the radius by more than the overshoot and MARGIN.
    share: list[float] = field(default_factory=list)
    # lambda times the sum of lr so far.
    spent: list[float] = field(default_factory=list)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    left: float = 1.0
    total: float = 0.0

    def __call__(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step:
            lr = next(float(g["lr"]) for g in optimizer.param_groups if g["algorithm"] == "spectral")
            self.left *= 1 - lr * self.decay
            self.total += lr * self.decay
        if step % self.every and step not in self.snapshots:
            return
        sigma = hidden(optimizer)
        largest = {name: float(s[0]) * self.decay for name, s in sigma.items()}
        self.first = self.first or largest
        radius = 1 + self.overshoot
        allowed = {name: radius + max(first - radius, 0.0) * self.left for name, first in self.first.items()}
        values = torch.cat(list(sigma.values()))
        self.step.append(step)
        self.spent.append(self.total)
        self.ratio.append(max(largest.values()))
        self.beyond.append(max(largest[name] - allowed[name] for name in largest))
        self.share.append(float((values * self.decay > radius * (1 + MARGIN)).double().mean()))
        if step in self.snapshots:
            self.spectra[str(step)] = thinned(values)

    def entered(self) -> float:
        """The measured step from which on every matrix is within MARGIN of the ball, overshoot included; inf if never."""
        inside = [ratio <= (1 + self.overshoot) * (1 + MARGIN) for ratio in self.ratio]
        last = max((i for i, ok in enumerate(inside) if not ok), default=-1)
        return float(self.step[last + 1]) if last + 1 < len(self.step) else math.inf


def muon(config: "Config", task: Task, name: str, decay: float, seed: int) -> Mapping[str, Any]:
    """A training with Muon and decay lambda: when and how its matrices enter the ball of radius 1/lambda."""
    own, factor = loop(config, task), 1 + OVERSHOOT[name]
    watch = Watch(decay, OVERSHOOT[name], config.every, (0, config.steps // 5, config.steps))
    starts: list[float] = []
    ends: dict[str, list[float]] = {}

    def build(model: nn.Module) -> torch.optim.Optimizer:
        head = [(entry.name, "adamw") for entry in schatten.plan(model)][-1:] if isinstance(_plain(model), MLP) else []
        return schatten.Muon(model, lr=config.lr, weight_decay=decay, scale="none", solver=solver(name), adamw=AUX, rules=head)

    def follow(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        watch(step, model, optimizer)
        if step == 0:
            starts.extend(s for part in attention(model).values() for s in part)
        if step == config.steps:
            ends.update(attention(model))

    found = fit(task, build, own, seed=seed, start=widened, watch=follow)
    lrs = [config.lr * lr_factor(own.schedule, t, own.steps, warmup=own.warmup, final=own.final_lr) for t in range(own.steps)]
    latest = [steps_to_enter(first / decay, lrs, decay, factor, margin=MARGIN) for first in watch.first.values()]
    return {
        "loss": found.loss,
        "accuracy": found.scores.get("accuracy"),
        "matrices": len(watch.first),
        "first": watch.ratio[0],
        "last": watch.ratio[-1],
        "beyond": max(watch.beyond),
        "entered": watch.entered(),
        "predicted": math.inf if None in latest else float(max(t for t in latest if t is not None)),
        "every": config.every,
        "step": watch.step,
        "spent": watch.spent,
        "ratio": watch.ratio,
        "share": watch.share,
        "spectra": watch.spectra,
        "attention": ends,
        "attention_first": starts,
    }


def adamw(config: "Config", task: Task, lr: float, seed: int) -> Mapping[str, Any]:
    """The same training with torch's AdamW for everything."""
    ends: dict[str, list[float]] = {}

    def build(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=AUX["betas"], weight_decay=ADAMW_DECAY, fused=True)

    def follow(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == config.steps:
            ends.update(attention(model))

    found = fit(task, build, loop(config, task), seed=seed, start=widened, watch=follow)
    return {"loss": found.loss, "attention": ends}


def attention(model: nn.Module) -> dict[str, list[float]]:
    """The singular values of W_Q, W_K and W_V, of all layers together."""
    found = {}
    for part in PARTS:
        own = [p for name, p in model.named_parameters() if name.endswith(f"attention.{part}.weight")]
        if own:
            found[part] = torch.cat([singular_values(p) for p in own]).tolist()
    return found


def thinned(values: Tensor) -> list[float]:
    """All of them, or SHOWN quantiles."""
    if len(values) <= SHOWN:
        return sorted(values.tolist())
    return np.quantile(values.numpy(force=True), np.linspace(0, 1, SHOWN)).tolist()


def _plain(model: nn.Module) -> nn.Module:
    """Without the wrapper of several processes."""
    return getattr(model, "module", model)
