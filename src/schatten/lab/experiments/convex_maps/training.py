"""A network under c K with decay, how long its updates are, and what its weights say about the problem they solve."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import schatten
from schatten.diagnostics.constraint import direction_bound
from schatten.diagnostics.fenchel_young import fenchel_young
from schatten.diagnostics.singular_values import singular_values
from schatten.lab import data, images
from schatten.lab.contest import TUNING_SEED
from schatten.lab.errors import InputError, named
from schatten.lab.experiments.convex_maps.table import MUON, dual_ball, table
from schatten.lab.fit import Fit, Loop, fit
from schatten.lab.models import GPT, MLP, GPTConfig
from schatten.lab.tasks import Classification, NextToken, Task
from schatten.layout import pieces
from schatten.maps import Map, Scaled

if TYPE_CHECKING:
    from schatten.lab.experiments.convex_maps import Config

MOMENTUM = 0.9
AUX = {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.9, 0.95)}

# Thresholds, in the root mean square of the singular values of Muon's momentum.
THRESHOLD = 0.1

# The share by which updates may be longer or shorter than Muon's before another training looks for a better factor.
CLOSE = 0.05

# Momenta of Muon's run that first guesses of factors are made on.
SAMPLES = 10

# A point this far outside K*'s domain, in units of its radius, is no point of the problem: its residual says nothing.
OUTSIDE = 0.01

# d log(length) / d log c: 1 where updates have a fixed length, less where longer ones make gradients smaller. Two points near
# each other are no safe guide to it.
SLOPES = (0.6, 1.5)

# Singular values that a picture gets.
SHOWN = 64


def task(config: "Config") -> Task:
    """The task of `config.network`. Raises InputError for another network or data that are not there."""
    if config.network == "mlp":
        pictures = images.load(config.data)
        widths = (math.prod(pictures.shape), *config.hidden, pictures.classes)
        return Classification(pictures, lambda: MLP(widths))
    if config.network == "gpt":
        with named("--text"):
            corpus = data.load(config.text, "byte", config.context)
        shape = GPTConfig(corpus.vocabulary, config.context, config.layers, config.heads, config.width)
        return NextToken(corpus, config.context, lambda: GPT(shape))
    raise InputError(f"--network has no {config.network!r}: known are mlp and gpt.")


def matrices(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The hidden matrices, which the map trains."""
    return [p for group in optimizer.param_groups if group["algorithm"] == "spectral" for p in group["params"]]


class Lengths:
    """Root mean square of the entries of the updates c grad K, of all hidden matrices and steps; decay is taken out."""

    def __init__(self, decay: float) -> None:
        self.decay, self.squares, self.count = decay, 0.0, 0
        self.before: list[Tensor] = []

    def __call__(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        now = [p.detach().clone() for p in matrices(optimizer)]
        if self.before:
            lr = next(float(g["lr"]) for g in optimizer.param_groups if g["algorithm"] == "spectral")
            for old, new in zip(self.before, now, strict=True):
                self.squares += float(((1 - lr * self.decay) * old - new).div(lr).square().sum())
                self.count += new.numel()
        self.before = now

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else math.nan


def build(config: "Config", K: Map, factor: float, model: nn.Module) -> schatten.SpectralOptimizer:
    """Lion-K's rule with equal-length averages: the Nesterov momentum of Muon, c grad K, explicit decoupled decay."""
    signal, scale = schatten.signals.Momentum(nesterov=True), schatten.scales.Scale("none")
    head = [(entry.name, "adamw") for entry in schatten.plan(model)][-1:] if config.network == "mlp" else []
    return schatten.SpectralOptimizer(
        model,
        schatten.Rule(signal, Scaled(K, factor), scale),
        lr=config.lr,
        weight_decay=config.decay,
        momentum=MOMENTUM,
        adamw=AUX,
        rules=head,
    )


def fitted(config: "Config", task: Task, K: Map, factor: float, seed: int, *watches: Any) -> Fit:
    """A training, followed by `watches`."""
    loop = Loop(config.steps, config.batch, schedule="linear", mixed_precision=config.precision)

    def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for each in watches:
            each(step, model, optimizer)

    return fit(task, lambda model: build(config, K, factor, model), loop, seed=seed, watch=watch)


def pilot(config: "Config", task: Task) -> Mapping[str, Any]:
    """Muon on the tuning seed: the length of its updates, thresholds, and the factor of every map on its momenta."""
    lengths, momenta = Lengths(config.decay), []
    every = max(1, config.steps // SAMPLES)

    def sample(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step and step % every == 0:
            momenta.append([optimizer.state[p]["momentum_buffer"].float().clone() for p in matrices(optimizer)])

    muon = table(1.0, 1, exact=config.exact)[MUON]
    fitted(config, task, muon, 1.0, TUNING_SEED, lengths, sample)
    every_one = [M for sampled in momenta for M in sampled]
    squares = torch.cat([singular_values(M).square() for M in every_one])
    threshold = THRESHOLD * float(squares.mean().sqrt())
    rank = min(min(M.shape[-2:]) for M in every_one)

    def length(K: Map) -> float:
        return math.sqrt(sum(float(K.grad(M).square().sum()) for M in every_one))

    factors = {name: length(muon) / length(K) for name, K in table(threshold, rank, exact=config.exact).items()}
    return {"threshold": threshold, "rank": rank, "rms": lengths.rms, "factors": factors}


def next_factor(first: float, tried: Sequence[tuple[float, float]], target: float) -> float:
    """The factor that makes updates `target` long, from (factor, length) of trainings: the secant in logarithms."""
    good = [(math.log(c), math.log(rms)) for c, rms in tried if math.isfinite(rms) and rms > 0]
    if not good:
        # A training that diverged says only that its factor was too large.
        return first / 4 ** len(tried)
    (x, y), slope = good[-1], 1.0
    if len(good) > 1 and (step := x - good[-2][0]):
        slope = min(max((y - good[-2][1]) / step, SLOPES[0]), SLOPES[1])
    return math.exp(x + (math.log(target) - y) / slope)


def matched(tried: Sequence[tuple[float, float]], target: float) -> bool:
    """Whether the last training had updates CLOSE to `target` in length."""
    return bool(tried) and abs(tried[-1][1] / target - 1) <= CLOSE


def trained(config: "Config", task: Task, K: Map, factor: float, seed: int) -> Mapping[str, Any]:
    """How long the updates of a training are."""
    lengths = Lengths(config.decay)
    found = fitted(config, task, K, factor, seed, lengths)
    return {"rms": lengths.rms, "loss": found.loss}


def verified(
    config: "Config", task: Task, name: str, maps: Mapping[str, Map], factors: Mapping[str, float], seed: int
) -> Mapping[str, Any]:
    """A training under factors[name] maps[name]: its loss, and what the weights say at its start and end.

    `ball` and `residual` have the start's and the end's, the largest of the matrices, `score` the sum of their residuals, in
    units of the loss per lr, which is 0 at rest and also falls where gradients vanish inside the domain. `others` is the end's
    residual in the problem of every map, `allowed` the dual-ball value that the rate of the decay allows at the end, `sigma`
    the singular values at the end and `radius` the spectral norm that K*'s domain allows.
    """
    K, factor, lengths = maps[name], factors[name], Lengths(config.decay)
    balls, residuals, scores, others, spectra, left = [], [], [], {}, [], 1.0

    def verify(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        nonlocal left
        if step:
            left *= 1 - config.decay * next(float(g["lr"]) for g in optimizer.param_groups if g["algorithm"] == "spectral")
        if step not in (0, config.steps):
            return
        blocks = gradients(config, task, model, optimizer)
        if not all(t.isfinite().all() for block in blocks for t in block):
            return
        balls.append(max(float(dual_ball(K, W * (config.decay / factor)).max()) for W, _ in blocks))
        residuals.append(residual(K, factor, config.decay, blocks))
        scores.append(sum(float(fenchel_young(K, W, G, config.decay, factor).residual.sum()) for W, G in blocks))
        if step:
            others.update({n: residual(maps[n], factors[n], config.decay, blocks) for n in maps})
            spectra.extend(thinned(torch.cat([singular_values(W).flatten() for W, _ in blocks])))

    found = fitted(config, task, K, factor, seed, lengths, verify)
    bound = direction_bound(K)
    return {
        "loss": found.loss,
        "accuracy": found.scores.get("accuracy"),
        "rms": lengths.rms,
        "problem": K.describe(config.decay, factor),
        "ball": balls,
        "allowed": 1 + max(balls[0] - 1, 0.0) * left,
        "residual": residuals,
        "score": scores,
        "others": others,
        "sigma": spectra,
        "radius": None if bound is None else bound * factor / config.decay,
        "steps": config.steps,
        "exact": config.exact,
    }


def gradients(config: "Config", task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Weights and gradients of the mean loss of `config.measured` batches, (blocks, m, n) of each hidden matrix."""
    # Several processes see the same batches here, so that the wrapper which averages gradients is not needed.
    inner, params = getattr(model, "module", model), matrices(optimizer)
    sums = [torch.zeros_like(p) for p in params]
    for i in range(config.measured):
        batch = [part.to(params[0].device) for part in task.batch(config.batch, seed=TUNING_SEED, step=i)]
        for total, g in zip(sums, torch.autograd.grad(task.loss(inner, *batch), params), strict=True):
            total += g / config.measured
    return [(piece.of(p.detach()), piece.of(G)) for p, G in zip(params, sums, strict=True) for piece in pieces("auto", p.shape)]


def residual(K: Map, factor: float, decay: float, blocks: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The Fenchel-Young residual over the size of its terms, the largest of the matrices; 1 if one is outside the domain."""
    worst = 0.0
    for W, G in blocks:
        found = fenchel_young(K, W, G, decay, factor)
        inner = found.residual - found.value - found.conjugate
        share = found.residual / (found.value + found.conjugate + inner.abs())
        far = dual_ball(K, W * (decay / factor)) > 1 + OUTSIDE
        worst = max(worst, float(torch.where(far, 1.0, share).max()))
    return worst


def thinned(values: Tensor) -> list[float]:
    """All of them, or SHOWN quantiles."""
    if len(values) <= SHOWN:
        return sorted(values.tolist())
    return np.quantile(values.numpy(force=True), np.linspace(0, 1, SHOWN)).tolist()
