"""Who takes a step: torch's optimizers, schatten's on each back-end, and peers."""

import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from gpu_parts.models import Parameters
from gpu_parts.timing import Step, extra_bytes, synchronize

import schatten

LR = 1e-3

ADAMW, TORCH_MUON = "torch.optim.AdamW, fused", "torch.optim.Muon"
EAGER, TRITON, GRAPH = "schatten.Muon, eager", "schatten.Muon, Triton", "schatten.Muon, CUDA graph"
POWER = "schatten.SpectralSGD(p=0.5)"

# Steps before a capture: kernels are compiled and tuned, and tables of addresses on the device, when it begins.
WARM_UP = 3


class Built(NamedTuple):
    """A step that is ready; what it may allocate at a time, and what a graph's capture did allocate."""

    step: Step
    max_batch_bytes: int | None = None
    captured_bytes: int | None = None


@dataclass(frozen=True)
class Contender:
    """`task` names the floor it is held against, `note` what differs from the others."""

    name: str
    task: str
    build: Callable[[Parameters], Built]
    note: str = ""
    ours: bool = False
    peer: bool = False


def contenders(device: torch.device, dtype: torch.dtype, peers: bool) -> list[Contender]:
    half = dtype != torch.float32
    torchs = f"averages in {str(dtype).removeprefix('torch.')}" if half else ""
    own = "averages in float32, stochastic rounding" if half else ""
    found = [
        Contender(ADAMW, "adamw", _adamw, torchs),
        Contender(TORCH_MUON, "muon", _torch_muon, torchs),
        Contender(EAGER, "muon", lambda p: _ours(schatten.Muon(p.groups(), lr=LR, kernels="eager")), own, ours=True),
    ]
    if device.type == "cuda":
        found += [
            Contender(TRITON, "muon", lambda p: _ours(schatten.Muon(p.groups(), lr=LR, kernels="triton")), own, ours=True),
            Contender(GRAPH, "muon", _graph, own, ours=True),
        ]
    found.append(Contender(POWER, "power", lambda p: _ours(schatten.SpectralSGD(p.groups(), 0.5, lr=LR)), own, ours=True))
    return found + (_peers() if peers else [])


def _ours(optimizer: schatten.SpectralOptimizer) -> Built:
    return Built(optimizer.step, optimizer.max_batch_bytes)


def _fused(params: list[torch.nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, fused=True)


def _adamw(parameters: Parameters) -> Built:
    return Built(_fused(parameters.own).step)


def _torch_muon(parameters: Parameters) -> Built:
    return _with_rest(torch.optim.Muon(parameters.matrices(), lr=LR), parameters)


def _with_rest(matrices: Any, parameters: Parameters) -> Built:
    rest = parameters.rest()
    return Built(_in_turn([matrices.step, *([_fused(rest).step] if rest else [])]))


def _in_turn(steps: Iterable[Step]) -> Step:
    steps = tuple(steps)

    def step() -> None:
        for one in steps:
            one()

    return step


def _graph(parameters: Parameters) -> Built:
    """A captured step of the Triton row, whose lr a schedule may change on the device."""
    device = parameters.own[0].device
    optimizer = schatten.Muon(parameters.groups(), lr=torch.tensor(LR, device=device), kernels="triton")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            optimizer.step()
    synchronize(device)
    # What is freed in a capture stays with the graph.
    gc.collect()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            optimizer.step()

    allocated = extra_bytes(capture, device)

    # The graph reads what the optimizer owns.
    def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
        graph.replay()

    return Built(step, optimizer.max_batch_bytes, allocated)


def _peers() -> list[Contender]:
    kernels = importlib.util.find_spec("quack") is not None
    return [
        Contender(
            "gram_newton_schulz.Muon",
            "muon",
            lambda p: _with_rest(_imported("gram_newton_schulz").Muon(p.matrices(), lr=LR, ns_use_kernels=kernels), p),
            "" if kernels else "without its kernels: quack is not installed",
            peer=True,
        ),
        Contender("heavyball.Muon", "muon", _heavyball, peer=True),
        Contender("pytorch_optimizer.Muon", "muon", lambda p: _pytorch_optimizer(p, "newton_schulz"), peer=True),
        Contender("pytorch_optimizer.Muon, Gram", "muon", lambda p: _pytorch_optimizer(p, "gram_newton_schulz"), peer=True),
    ]


def _imported(name: str) -> Any:
    return importlib.import_module(name)


def _heavyball(parameters: Parameters) -> Built:
    matrices = parameters.matrices()
    gradients = [p.grad for p in matrices]
    built = _with_rest(_imported("heavyball").Muon(matrices, lr=LR), parameters)

    # Its step drops the gradients.
    def renew() -> None:
        for p, gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient

    return Built(_in_turn([renew, built.step]))


def _pytorch_optimizer(parameters: Parameters, method: str) -> Built:
    muon = _imported("pytorch_optimizer").Muon
    return _with_rest(muon([{"params": parameters.matrices(), "use_muon": True}], lr=LR, ns_method=method), parameters)
