"""Beyond which batch size do more samples no longer save steps of Muon, and do decay and Nesterov move it?

Sato, Naganuma and Iiduka bound the gradient norm of Muon after T steps with batches of b, for four variants, Nesterov on
and off, decay on and off. What can be measured of it (inferred from the bound) is

    X / T + Y / b + Z <= eps^2     so     T(b) = X b / ((eps^2 - Z) b - Y),     N(b) = b T(b)

steps and gradients to a target. N has its minimum at the critical batch b* = 2 Y / (eps^2 - Z), and b <= b* / 2 never
arrives. X, Y and Z hold the learning rate, so the form is that of one lr for all batches; Y is thought to grow as
(1 - beta) sigma^2 r. The paper (v5) claims only a lower bound of b*, qualitative in beta and lambda: noise, precision and
rank cannot be observed, so there is no number to compare with. With decay, ||W|| stays bounded if lr <= 1 / lambda.

Both are measured: the lr tuned for each batch anew with the same number of trials, and the lr that was best at one batch
used for all. Beside the paper's form stands the usual one, T(b) = a (1 + c / b) (1812.06162), whose N = a (b + c) only
bends: at b = c a run takes twice the fewest steps and twice the fewest gradients.

The settings are ours, none were at hand: an MLP on the digits, constant lr, scale `adamw-rms` so that one grid of lr serves
AdamW too, no other parameters than matrices. T is the first step after which the loss of training images is at
most the target, between steps along the logarithm of the loss; noise of small batches makes first passages a little early.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import schatten
from schatten.diagnostics.noise_scale import micro_gradients, noise_scale, nuclear_noise
from schatten.lab import images
from schatten.lab.contest import TUNING_SEED
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.critical_batch.comparison import check
from schatten.lab.experiments.critical_batch.pictures import CAPTIONS, pictures
from schatten.lab.experiments.critical_batch.variants import MOMENTUM, VARIANTS, Variant
from schatten.lab.fit import Fit, Loop, fit
from schatten.lab.ledger import Ledger, Row
from schatten.lab.models import MLP
from schatten.lab.statistics import mean
from schatten.lab.tasks import Classification
from schatten.metrics import spectral_norm

# One seed's luck at an lr on the verge of instability would choose it.
TUNING_SEEDS = (TUNING_SEED, TUNING_SEED + 1)
PATIENCE = 1.25

# Micro-batches behind a noise scale: its error is some 30 % with so many.
MICRO_BATCHES = 32
MICRO_BATCH = 16


@dataclass(frozen=True)
class Config:
    """Quick: 9,000 weights, 1,437 images. Full: the same on CIFAR-10."""

    seeds: int = 4
    data: str = option("digits", "Images: 'digits' or a folder.")
    hidden: tuple[int, ...] = option((64, 64), "Widths of the hidden layers.")
    target: float = option(0.1, "Training loss to reach, in nats, and")
    evaluated: int = option(256, "the number of training images it is taken over.")
    batches: tuple[int, ...] = option((16, 32, 64, 128, 256, 512, 1024), "Batch sizes.")
    reference: int = option(128, "The batch whose best lr is used for all batches in the second measurement.")
    lr: tuple[float, ...] = option((0.0075, 0.015, 0.03, 0.06, 0.12, 0.24), "The grid of learning rates, for all.")
    weight_decay: float = option(0.1, "lambda of the variants with decay.")
    steps: int = option(60, "Most steps of a run, and")
    samples: int = option(3200, "of its gradients: a run has at most steps + samples / batch steps.")
    products: tuple[float, ...] = option((0.0, 0.5, 1.0, 1.5, 2.1), "lr x lambda, for the bound of ||W||.")
    bound_lr: float = option(0.04, "lr of the runs for that bound, and")
    bound_steps: int = option(60, "their steps.")


def run(config: Config, ledger: Ledger) -> None:
    """Tune and measure every variant at every batch, then at one lr; then the noise scale and the bound of the weights."""
    if config.reference not in config.batches:
        raise InputError(f"--reference must be one of --batches {config.batches}, got {config.reference}.")
    data = images.load(config.data)
    widths = (math.prod(data.shape), *config.hidden, data.classes)
    # The claim is of optimisation: the loss of the training images, which has no floor above the target.
    evaluated = replace(data, test=data.train[: config.evaluated], test_labels=data.train_labels[: config.evaluated])
    task = Classification(evaluated, lambda: MLP(widths))
    for variant in VARIANTS:
        best, near = {}, sorted(config.lr)[len(config.lr) // 2]
        for b in sorted(config.batches, reverse=True):
            best[b] = near = _tuned(config, ledger, task, variant, b, near)
        for b in config.batches:
            for seed in range(config.seeds):
                _measure(config, ledger, task, variant, "tuned", b, best[b], seed)
        for b in config.batches if variant.fixed else ():
            for seed in range(config.seeds):
                _measure(config, ledger, task, variant, "fixed", b, best[config.reference], seed)
        if variant is VARIANTS[0]:
            for seed in range(config.seeds):
                case = {"phase": "noise", "lr": best[config.reference], "seed": seed}
                ledger.measure(case, lambda lr=best[config.reference], seed=seed: _noise(config, task, lr, seed))
    for product in config.products:
        for seed in range(config.seeds):
            case = {"phase": "bound", "product": product, "seed": seed}
            ledger.measure(case, lambda product=product, seed=seed: _bound(config, task, product, seed))


def limit(config: Config, batch: int) -> int:
    """The most steps of a run with batches of this size."""
    return config.steps + math.ceil(config.samples / batch)


def crossing(found: Fit, target: float) -> float:
    """The step at which the loss falls to `target`, between evaluations along log loss; inf where it never does."""
    before = None
    for step, loss in found.curve:
        if loss <= target:
            if before is None or loss <= 0:
                return float(step)
            share = math.log(before[1] / target) / math.log(before[1] / loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return math.inf


def _tuned(config: Config, ledger: Ledger, task: Classification, variant: Variant, batch: int, near: float) -> float:
    """The lr of the grid with the fewest steps, the geometric mean over the tuning seeds; every lr is one trial.

    The grid is tried outwards from `near`, and a run ends where its lr can no longer win: far from the best lr trials are
    short, and none is left out.
    """
    best, fewest = near, math.inf
    for lr in sorted(config.lr, key=lambda lr: abs(math.log(lr / near))):
        product = 1.0
        for seed in TUNING_SEEDS:
            # After the first seed the mean is what counts; before it, one that takes far longer is given up.
            most = PATIENCE * fewest if seed == TUNING_SEEDS[0] else fewest**2 / product
            most = math.ceil(min(most, limit(config, batch)))
            product *= _measure(config, ledger, task, variant, "tune", batch, lr, seed, most)["steps"]
            if math.isinf(product):
                break
        if math.sqrt(product) < fewest:
            best, fewest = lr, math.sqrt(product)
    return best


def _measure(
    config: Config,
    ledger: Ledger,
    task: Classification,
    variant: Variant,
    phase: str,
    batch: int,
    lr: float,
    seed: int,
    most: int | None = None,
) -> Row:
    most = limit(config, batch) if most is None else most
    case = {"phase": phase, "optimizer": variant.name, "batch": batch, "lr": lr, "limit": most, "seed": seed}

    def compute() -> Mapping[str, Any]:
        found = _train(config, task, variant, lr, Loop(most, batch, schedule="constant", eval_every=1), seed)
        return {"steps": crossing(found, config.target), "loss": found.best, "seconds": found.seconds}

    return ledger.measure(case, compute)


def _train(config: Config, task: Classification, variant: Variant, lr: float, loop: Loop, seed: int, watch: Any = None) -> Fit:
    """Until the target, which `report` sees."""
    return fit(
        task,
        lambda model: variant.build(model, lr, config.weight_decay),
        loop,
        seed=seed,
        watch=watch,
        report=lambda step, loss: loss <= config.target,
    )


def _noise(config: Config, task: Classification, lr: float, seed: int) -> Mapping[str, Any]:
    """Noise scales at the weights that reach the target, in samples."""
    kept: list[nn.Module] = []
    loop = Loop(limit(config, config.reference), config.reference, schedule="constant", eval_every=1)
    _train(config, task, VARIANTS[0], lr, loop, seed, lambda step, model, opt: kept.append(model) if step == 0 else None)
    model = kept[0]
    params = list(model.parameters())
    batches = [task.batch(MICRO_BATCH, seed=TUNING_SEED + seed, step=step) for step in range(MICRO_BATCHES)]
    losses = [lambda b=b: task.loss(model, *(part.to(params[0].device) for part in b)) for b in batches]
    gradients = micro_gradients(losses, params, model=model)
    simple, nuclear = noise_scale(gradients, MICRO_BATCH), nuclear_noise(gradients, MICRO_BATCH)
    low, high = (float(b) for b in nuclear.scale)
    return {"simple": float(simple.scale.value), "nuclear_low": low, "nuclear_high": high}


def _bound(config: Config, task: Classification, product: float, seed: int) -> Mapping[str, Any]:
    """||W||_op of the matrices during training with lr x lambda = `product`.

    `largest`: over max(||W_0||_op, c / lambda), at any step; `settled`: over c / lambda, in the second half; `growth`: at the
    end over halfway.
    """
    lr = config.bound_lr
    sizes: list[list[float]] = []

    def build(model: nn.Module) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            # What the library warns of, lr x lambda above 1, is what is measured.
            warnings.filterwarnings("ignore", "lr .* weight_decay is")
            return schatten.Muon(model, lr=lr, weight_decay=product / lr, momentum=MOMENTUM)

    def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        norms = [float(spectral_norm(W.detach())) for W in model.parameters()]
        sizes.append([norm if math.isfinite(norm) else math.inf for norm in norms])

    loop = Loop(config.bound_steps, config.reference, schedule="constant")
    found = fit(task, build, loop, seed=seed, watch=watch)
    factors = [schatten.scales.Scale().factor(*W.shape) for W in task.model().parameters()]
    radii = [c * lr / product if product else 0.0 for c in factors]
    starts, half = sizes[0], len(sizes) // 2
    largest = max(max(s / max(w, r) for s, w, r in zip(at, starts, radii, strict=True)) for at in sizes)
    settled = max(max(s / r for s, r in zip(at, radii, strict=True)) for at in sizes[half:]) if product else math.inf
    growth = mean([end / middle for end, middle in zip(sizes[-1], sizes[half], strict=True)])
    return {"largest": largest, "settled": settled, "growth": growth, "diverged": found.diverged}


EXPERIMENT = Experiment(
    "arXiv 2507.01598",
    Config(),
    Config(
        data="data/cifar10",
        hidden=(512, 256, 64),
        target=1.0,
        batches=(8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        reference=512,
        lr=tuple(0.0001 * 2**k for k in range(10)),
        steps=2000,
        samples=4_000_000,
        evaluated=5000,
        bound_steps=1000,
    ),
    run,
    check,
    pictures,
    CAPTIONS,
    "One network and one target; the paper's own settings are not at hand, beta is varied at one other value only, and with "
    "one lr for all batches only Muon with and without decay and AdamW are measured.",
)
