"""Training with EF21-Muon, several workers with samples of their own: the bytes sent until a validation loss is reached.

All matrices are sent compressed, as in the paper: hidden ones take msign of the estimate, embeddings and a head that shares
theirs the sign, which is the LMO of the largest entry; norms' vectors go to AdamW uncompressed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from schatten import plan
from schatten.compressors import Compressor, Identity, Natural, RankK, Sign, TopK
from schatten.lab import data, images
from schatten.lab.errors import InputError
from schatten.lab.models import GPT, MLP, GPTConfig
from schatten.lab.tasks import Classification, NextToken, Task
from schatten.lab.tuning import Params, Space, Span
from schatten.maps import L1
from schatten.presets import EF21Muon
from schatten.retractions import DecoupledDecay, ServerCompression
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import ErrorFeedback


@dataclass(frozen=True)
class Method:
    """What workers send to the server and the server to workers."""

    name: str
    up: Compressor
    down: Compressor


UNCOMPRESSED = "uncompressed"

PLAIN = Identity()

LR = Span(3e-3, 0.2)


def methods(rank: int) -> tuple[Method, ...]:
    """Every compressor of the library, TopK at two shares, and two with both directions compressed."""
    return (
        Method(UNCOMPRESSED, PLAIN, PLAIN),
        Method("Natural", Natural(), PLAIN),
        Method("TopK 20 %", TopK(0.2), PLAIN),
        Method("TopK 5 %", TopK(0.05), PLAIN),
        Method(f"RankK {rank}", RankK(rank), PLAIN),
        Method("Sign", Sign(), PLAIN),
        Method("TopK 5 %, Natural back", TopK(0.05), Natural()),
        Method("Sign, Sign back", Sign(), Sign()),
    )


@dataclass(frozen=True)
class Setting:
    """One training: `batch` samples for each of `workers` in a step, an evaluation every `every` steps, until `target`."""

    workers: int
    batch: int
    steps: int
    every: int
    target: float


def task(name: str, hidden: tuple[int, ...], gpt: tuple[int, int, int, int], tokens: str) -> Task:
    """`"digits"`: a perceptron with layers of `hidden`; else a GPT of (context, layers, heads, width) on the text `name`."""
    if name == images.EMBEDDED:
        return Classification(images.load(), lambda: MLP((64, *hidden, 10)))
    context, layers, heads, width = gpt
    corpus = data.load(name, tokens, context)
    return NextToken(corpus, context, lambda: GPT(GPTConfig(corpus.vocabulary, context, layers, heads, width)))


def space(model: nn.Module) -> Space:
    """What is tuned: lr of the matrices, their decay, and of embeddings and norms an lr of their own where there are any."""
    beside = any(entry.route == "adamw" for entry in plan(model))
    own = {"table_lr": Span(1e-4, 1e-1), "aux_lr": Span(1e-4, 1e-1)} if beside else {}
    return {"lr": LR, **own, "weight_decay": [0.0, 0.1]}


def build(model: nn.Module, method: Method, params: Params, workers: int) -> EF21Muon:
    """`workers` in this process, or as many as there are ranks."""
    named = dict(model.named_parameters())
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "vectors": []}
    for entry in plan(model):
        kind = "matrices" if entry.route == "spectral" else "tables" if len(entry.shape) == 2 else "vectors"
        kinds[kind].append(named[entry.name])
    sign = Rule(ErrorFeedback(method.up), L1(), Scale("none"), ServerCompression(DecoupledDecay(), method.down))
    groups: list[dict[str, Any]] = [{"params": kinds["matrices"]}]
    if kinds["tables"]:
        groups.append({"params": kinds["tables"], "rule": sign, "lr": params["table_lr"], "weight_decay": 0.0})
    if kinds["vectors"]:
        groups.append({"params": kinds["vectors"], "algorithm": "adamw", "lr": params["aux_lr"], "weight_decay": 0.0})
    options = {"lr": params["lr"], "weight_decay": params["weight_decay"], "momentum": 0.9, "workers": workers}
    return EF21Muon(groups, compressor=method.up, server_compressor=method.down, **options)


def train(task: Task, method: Method, params: Params, setting: Setting, seed: int) -> Mapping[str, Any]:
    """Train until the validation loss is at most `target`, or for `steps`.

    Found are `steps`, `up` and `down` (the bytes sent by then, inf where the target was never reached), the last `loss`, the
    `ratio` of bytes that uncompressed messages would take in the same steps to `up`, and `curve`, rows of (step, loss, bytes
    up, bytes down).
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    ranks = state.num_processes
    if ranks > 1 and ranks != setting.workers:
        raise InputError(f"--workers must be {ranks}, as each process is one worker, got {setting.workers}.")
    here = range(setting.workers) if ranks == 1 else [state.process_index]
    device = state.device or torch.device("cpu")
    torch.manual_seed(seed)
    model = task.model().to(device)
    optimizer = build(model, method, params, setting.workers if ranks == 1 else 1)
    curve: list[tuple[int, float, int, int]] = []
    dense = 0
    for step in range(1, setting.steps + 1):
        whole = task.batch(setting.workers * setting.batch, seed=seed, step=step - 1)
        for j in here:
            with optimizer.worker(j):
                task.loss(model, *(part[j :: setting.workers].to(device) for part in whole)).backward()
        optimizer.step()
        if step % setting.every == 0 or step == setting.steps:
            with torch.no_grad():
                loss = task.evaluate(model, device)["loss"]
            sent = optimizer.metrics() or {}
            dense = sent["bytes_dense"]
            curve.append((step, loss, sent["bytes_to_server"], sent["bytes_to_workers"]))
            if not math.isfinite(loss) or loss <= setting.target:
                break
    step, loss, up, down = curve[-1]
    arrived = loss <= setting.target
    return {
        **dict(zip(("steps", "up", "down"), (step, up, down) if arrived else (math.inf,) * 3, strict=True)),
        "loss": loss if math.isfinite(loss) else math.inf,
        "ratio": dense / up,
        "curve": curve,
    }


def score(found: Mapping[str, Any], setting: Setting) -> float:
    """Lower is better: steps to the target, or beyond all of them by how far the last loss is from it."""
    if math.isfinite(found["steps"]):
        return float(found["steps"])
    return setting.steps * found["loss"] / setting.target
