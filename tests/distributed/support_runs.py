"""What a loop does around a step, in every placement: clipping, a scaler, hooks, metrics, compilation, closures.

Each feature trains the parity model and returns its weights, or the error that refuses it and whose that is.
"""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import schatten
from tests.distributed.parity_model import GPT, RULES, loss, whole
from tests.distributed.parity_runs import Placed, Weights, ddp, fsdp, fsdp_and_tensor_parallel, hsdp, one, tensor_parallel

STEPS = 2

# Products as exact as one process's: what is left is the order of sums.
FP32 = {"solver": schatten.solvers.polynomial(dtype="float32")}


def offloaded(model: GPT, rank: int, size: int) -> Placed:
    mesh, policy = init_device_mesh("cpu", (size,)), CPUOffloadPolicy(pin_memory=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=policy), rank, size


# How a model is wrapped and the `placement` that its optimizer is given. Left to itself DDP would send none of these small
# matrices.
PLACEMENTS: dict[str, tuple[Callable[[GPT, int, int], Placed], str | None]] = {
    "one process": (one, None),
    "DDP": (ddp, "owners"),
    "DDP, zero1": (ddp, "zero1"),
    "FSDP2": (fsdp, None),
    "HSDP": (hsdp, None),
    "tensor parallel": (tensor_parallel, None),
    "FSDP2 and tensor parallel": (fsdp_and_tensor_parallel, None),
}

# Tried with nothing else: on a mesh of CPUs there is nothing to copy.
OFFLOADED = "FSDP2, offloaded"

# The preset, its options, and what a step does.
Feature = tuple[str, dict[str, Any], Callable[..., Any]]


class Loop:
    """One rank's model and optimizer, and the loss of its share of a batch."""

    def __init__(self, placement: str, preset: str, options: dict[str, Any], rank: int, size: int) -> None:
        wrap, option = {**PLACEMENTS, OFFLOADED: (offloaded, None)}[placement]
        self.model, self.part, self.parts = wrap(GPT(), rank, size)
        options = {**options, **({"placement": option} if option else {})}
        self.opt = getattr(schatten.presets, preset)(self.model, lr=3e-3, rules=RULES, **options)

    def loss(self, step: int, model: nn.Module | None = None) -> torch.Tensor:
        return loss(self.model if model is None else model, step, self.part, self.parts)

    def weights(self) -> Weights:
        named = {name.removeprefix("module."): p for name, p in self.model.named_parameters()}
        return {name: whole(p.detach()).clone() for name, p in named.items()}


def plain(loop: Loop, steps: int = STEPS, model: nn.Module | None = None) -> None:
    for step in range(steps):
        loop.loss(step, model).backward()
        loop.opt.step()
        loop.opt.zero_grad()


def clipped(loop: Loop) -> None:
    for step in range(STEPS):
        loop.loss(step).backward()
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.1)
        loop.opt.step()
        loop.opt.zero_grad()


def clipped_apart(loop: Loop) -> None:
    for step in range(STEPS):
        loop.loss(step).backward()
        schatten.clip_grad_norm_(loop.opt, 0.1)
        loop.opt.step()
        loop.opt.zero_grad()


def scaled(loop: Loop) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(STEPS):
        scaler.scale(loop.loss(step)).backward()
        scaler.step(loop.opt)
        scaler.update()
        loop.opt.zero_grad()


def accumulated(loop: Loop) -> None:
    for step in range(STEPS):
        for part in (2 * step, 2 * step + 1):
            loop.loss(part).backward()
        loop.opt.step()
        loop.opt.zero_grad()


def scheduled(loop: Loop) -> None:
    scheduler = torch.optim.lr_scheduler.LinearLR(loop.opt, 1.0, 0.1, STEPS)
    for step in range(STEPS):
        loop.loss(step).backward()
        loop.opt.step()
        scheduler.step()
        loop.opt.zero_grad()


def in_backward(loop: Loop) -> None:
    with loop.opt.step_in_backward():
        plain(loop)


def overlapped(loop: Loop) -> None:
    with loop.opt.overlap(loop.model):
        plain(loop)


def compiled(loop: Loop) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own hooks
        plain(loop, model=torch.compile(loop.model, backend="eager"))


def measured(loop: Loop) -> dict[str, Any]:
    for step in range(STEPS):
        loop.loss(step).backward()
        loop.opt.step()
        loop.opt.zero_grad()
        found = loop.opt.metrics(every=1)
    return {"metrics": found}


def tested(loop: Loop) -> dict[str, Any]:
    plain(loop, 1)
    before = loop.weights()
    report = loop.opt.self_test()
    after = loop.weights()
    return {"ok": all(check.ok for check in report), "unchanged": all(torch.equal(before[k], after[k]) for k in before)}


def evaluating(loop: Loop) -> None:
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            loop.opt.zero_grad()
            value = loop.loss(step)
            if torch.is_grad_enabled():
                value.backward()
            return value.detach()

        loop.opt.step(closure)


FEATURES: dict[str, Feature] = {
    "plain": ("Muon", FP32, plain),
    "torch's clip_grad_norm_": ("Muon", FP32, clipped),
    "schatten.clip_grad_norm_": ("Muon", FP32, clipped_apart),
    "GradScaler": ("Muon", FP32, scaled),
    "accumulation": ("Muon", FP32, accumulated),
    "scheduler": ("Muon", FP32, scheduled),
    "step_in_backward": ("Muon", FP32, in_backward),
    "overlap": ("Muon", FP32, overlapped),
    "torch.compile": ("Muon", FP32, compiled),
    "metrics": ("Muon", FP32, measured),
    "self_test": ("Muon", FP32, tested),
    "bf16 state": ("Muon", {**FP32, "state_dtype": "bfloat16"}, plain),
    "int8 state": ("Muon", {**FP32, "state_dtype": "int8"}, plain),
    "closure": ("MuonMVR", {**FP32, "exact": True}, evaluating),
    "closure without backward": ("JaguarMuon", FP32, evaluating),
    "EF21": ("EF21Muon", FP32, plain),
}


def outcome(feature: str, placement: str, rank: int, size: int) -> dict[str, Any]:
    preset, options, train = FEATURES[feature]
    try:
        loop = Loop(placement, preset, options, rank, size)
        seen = train(loop) or {}
    except (TypeError, ValueError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        return {"refused": f"{type(error).__name__}: {error}", "by": "schatten" if _ours(frames[-1].filename) else "torch"}
    return {**seen, "weights": loop.weights()}


def _ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(schatten.__file__).parent)


def of_rank(rank: int, size: int, cells: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [outcome(feature, placement, rank, size) for feature, placement in cells]
