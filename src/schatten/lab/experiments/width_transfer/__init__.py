"""Does one learning rate serve all widths if updates, or weights too, keep the spectral scale of muP?

Feature learning at every width asks of every matrix (m outputs, n inputs) ||W||_op ~ sqrt(m/n) and ||dW||_op ~ sqrt(m/n).
Muon with scale `mup` keeps the second; Muon++ starts at the first as well and divides each direction by its spectral norm:

    ||W_0||_op = sqrt(m/n),     W <- (1 - lr lambda) W - lr sqrt(m/n) O / ||O||_op,     O = msign(S)

so ||W_t||_op <= max(||W_0||_op, sqrt(m/n) / lambda) (inferred; the paper's equations are not at hand). The paper finds that
for moderately large models control of the updates alone suffices. Scale `keller`, sqrt(max(1, m/n)), is too long for the
head by sqrt(n/m), `adamw-rms`, 0.2 sqrt(max(m, n)), for square matrices by sqrt(n) and for the head by more, and AdamW's
update has a spectral norm ~ n where it has low rank: their best lr should fall with width.

An MLP, depth 3, without biases, whose matrices all follow one rule, the head too, so that one lr is all there is to tune.
For every width each contender tries the same number of lr, powers of two, walking outwards from the best of the width
before; the best log2 lr of a seed is the vertex of the parabola through its lowest loss and the neighbours. The coordinate
check takes a few steps with a small lr that is the same at all widths and compares the change of every layer's output, as
RMS on fixed inputs. Losses are of training images. Sizes and steps are ours.

Without the spectral start the head begins at ||W_0||_op ~ 1, sqrt(n/m) times its scale, and the gradient of the layer before
is aligned with it: a change of hidden units reaches the output with a factor ~ sqrt(n), which no control of updates removes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from schatten.lab import images
from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment, option
from schatten.lab.experiments.width_transfer.comparison import check
from schatten.lab.experiments.width_transfer.contenders import ABLATED, CONTENDERS, Contender
from schatten.lab.experiments.width_transfer.pictures import CAPTIONS, pictures
from schatten.lab.fit import Loop, fit
from schatten.lab.ledger import Ledger
from schatten.lab.models import MLP
from schatten.lab.statistics import mean
from schatten.lab.tasks import Classification
from schatten.metrics import spectral_norm

# The share of the narrowest model's best lr with which coordinates are checked: changes stay small at every width.
CHECK_SHARE = 1 / 8

# Images whose outputs are compared.
PROBES = 256


@dataclass(frozen=True)
class Config:
    """Quick: widths 64 to 512 on 1,437 images. Full: 64 to 4096 on CIFAR-10, ten times as long or more."""

    seeds: int = 4
    data: str = option("digits", "Images: 'digits' or a folder.")
    widths: tuple[int, ...] = option((64, 128, 256, 512), "Widths of the hidden layers.")
    hidden: int = option(2, "Hidden layers.")
    steps: int = option(32, "Steps of a run.")
    batch: int = option(64, "Batch size.")
    evaluated: int = option(1437, "Training images over which the loss at the end is taken.")
    weight_decay: float = option(0.1, "Decoupled decay, for all.")
    trials: int = option(5, "Learning rates tried by each contender at each width.")
    check_steps: int = option(5, "Steps of the coordinate check.")
    ablation: int = option(128, "The width at which parts of Muon++ are compared.")


def run(config: Config, ledger: Ledger) -> None:
    """The lr sweep of every contender and width, then coordinates and spectral norms at one lr for all widths."""
    if config.ablation not in config.widths:
        raise InputError(f"--ablation must be one of --widths {config.widths}, got {config.ablation}.")
    if config.trials < 3:
        raise InputError(f"--trials must be at least 3, a minimum and its neighbours, got {config.trials}.")
    data = images.load(config.data)
    # Best learning rates by the training loss at the end: on few images the test loss has a minimum of its own, of overfitting.
    seen = replace(data, test=data.train[: config.evaluated], test_labels=data.train_labels[: config.evaluated])
    tasks = {w: Classification(seen, lambda w=w: MLP(_widths(data, config, w))) for w in config.widths}
    for contender in CONTENDERS:
        best = contender.start_at
        base = None
        for width in sorted(config.widths):
            best = _sweep(config, ledger, tasks[width], contender, width, best)
            base = best if base is None else base
        assert base is not None
        for width in sorted(config.widths):
            for seed in range(config.seeds):
                case = {"contender": contender.name, "width": width, "seed": seed}
                small = {"phase": "coordinates", **case, "lr": CHECK_SHARE * 2.0**base}
                ledger.measure(
                    small, lambda s=small, w=width, c=contender: _coordinates(config, tasks[w], c, s["lr"], s["seed"])
                )
                same = {"phase": "transfer", **case, "lr": 2.0**base}
                ledger.measure(same, lambda s=same, w=width, c=contender: _transfer(config, tasks[w], c, s["lr"], s["seed"]))
    for contender in ABLATED:
        _sweep(config, ledger, tasks[config.ablation], contender, config.ablation, contender.start_at)


def walk(loss: Callable[[int], float], start: int, trials: int) -> int:
    """The exponent of the lowest `loss(k)` of `trials` neighbouring ones: outwards from `start`, always towards lower loss."""
    tried = {k: loss(k) for k in (start - 1, start, start + 1)}
    while len(tried) < trials:
        low, high = min(tried), max(tried)
        best = min(tried, key=lambda k: tried[k])
        # Best at an end: on. Best inside: the end with the lower loss, whose side the minimum is on.
        down = best == low or (best != high and tried[low] <= tried[high])
        k = low - 1 if down else high + 1
        tried[k] = loss(k)
    return min(tried, key=lambda k: tried[k])


def _widths(data: images.Images, config: Config, width: int) -> tuple[int, ...]:
    return (math.prod(data.shape), *[width] * config.hidden, data.classes)


def _sweep(config: Config, ledger: Ledger, task: Classification, contender: Contender, width: int, start: int) -> int:
    def loss(k: int) -> float:
        losses = []
        for seed in range(config.seeds):
            case = {"phase": "sweep", "contender": contender.name, "width": width, "lr": 2.0**k, "seed": seed}

            def compute(k: int = k, seed: int = seed) -> Mapping[str, Any]:
                loop = Loop(config.steps, config.batch, schedule="linear")
                found = fit(task, contender.optimizer(2.0**k, config.weight_decay), loop, seed=seed, start=contender.start)
                return {"loss": found.loss, "train": found.tail(), "seconds": found.seconds}

            losses.append(ledger.measure(case, compute)["loss"])
        return mean(losses)

    return walk(loss, start, config.trials)


def _coordinates(config: Config, task: Classification, contender: Contender, lr: float, seed: int) -> Mapping[str, Any]:
    """RMS of the change of every layer's output on fixed inputs, after a few steps."""
    seen: list[list[Tensor]] = []

    def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step in (0, config.check_steps):
            seen.append(outputs(model, task.data.test[:PROBES]))

    loop = Loop(config.check_steps, config.batch, schedule="constant")
    fit(task, contender.optimizer(lr, config.weight_decay), loop, seed=seed, start=contender.start, watch=watch)
    if len(seen) < 2:
        return {"change": []}
    return {"change": [float((after - before).square().mean().sqrt()) for before, after in zip(*seen, strict=True)]}


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What every linear layer returns for `images`."""
    found: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    model(images.to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return found


def _transfer(config: Config, task: Classification, contender: Contender, lr: float, seed: int) -> Mapping[str, Any]:
    """||W||_op / sqrt(m/n) and ||dW||_op / (lr sqrt(m/n)) of every matrix at five times of a whole run."""
    times = {round(share * config.steps) for share in (0, 0.25, 0.5, 0.75, 1)}
    weights: list[list[float]] = []
    updates: list[list[float]] = []
    before: list[Tensor] = []

    def watch(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        matrices = [W.detach() for W in model.parameters()]
        units = [math.sqrt(W.shape[0] / W.shape[1]) for W in matrices]
        if step in times:
            weights.append([float(spectral_norm(W)) / unit for W, unit in zip(matrices, units, strict=True)])
        if before and step in times:
            now = optimizer.param_groups[0]["lr"]
            kept = 1 - now * config.weight_decay
            moved = [spectral_norm(W - kept * V) for W, V in zip(matrices, before, strict=True)]
            updates.append([float(size) / (now * unit) for size, unit in zip(moved, units, strict=True)])
        before[:] = [W.clone() for W in matrices] if step + 1 in times else []

    loop = Loop(config.steps, config.batch, schedule="linear")
    optimizer = contender.optimizer(lr, config.weight_decay)
    found = fit(task, optimizer, loop, seed=seed, start=contender.start, watch=watch)
    return {"loss": found.loss, "weights": weights, "updates": updates}


EXPERIMENT = Experiment(
    "arXiv 2601.01306",
    Config(),
    Config(
        seeds=5,
        data="data/cifar10",
        widths=(64, 128, 256, 512, 1024, 2048, 4096),
        steps=2000,
        batch=128,
        evaluated=10000,
        trials=7,
        ablation=1024,
    ),
    run,
    check,
    pictures,
    CAPTIONS,
    "An MLP without embeddings, attention or residual connections; depth is not varied, and the paper's language models are "
    "not trained.",
)
