"""Parameters without a forward that get the same gradients on every rank, so that placements differ in the optimizer alone."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.placements.states import cut
from tests.distributed.parity_model import whole

Values = dict[str, Tensor]


def weights(model: nn.Module) -> Values:
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in model.named_parameters()}


def state(model: nn.Module, opt: torch.optim.Optimizer) -> Values:
    """All of each tensor of state, by names that do not depend on the placement."""
    names = {p: name.removeprefix("module.") for name, p in model.named_parameters()}
    return {f"{names[p]}: {key}": whole(t).clone() for p, own in opt.state.items() for key, t in own.items()}


class Parts(nn.Module):
    """Matrices, of which some shards are uneven and some empty on four ranks, a convolution, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.thin = nn.Linear(12, 21), nn.Linear(21, 12), nn.Linear(12, 1)
        self.conv = nn.Conv1d(5, 6, 3)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)


def _replicated(model: nn.Module, size: int) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: nn.Module, size: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (size,)))


def _hsdp(model: nn.Module, size: int) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))


def _parallel(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _fsdp_and_parallel(model: nn.Module, size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    return fully_shard(_parallel(model, mesh["tensor"]), mesh=mesh["data"])


# How a model is wrapped, and the `placement` of its optimizer.
PLACEMENTS: dict[str, tuple[Callable[[nn.Module, int], nn.Module], str | None]] = {
    "one process": (lambda model, size: model, None),
    "owners": (_replicated, "owners"),
    "zero1": (_replicated, "zero1"),
    "FSDP2": (_fsdp, None),
    "HSDP": (_hsdp, None),
    "tensor parallel": (lambda model, size: _parallel(model, init_device_mesh("cpu", (size,))), None),
    "FSDP2 and tensor parallel": (_fsdp_and_parallel, None),
}


class Run(NamedTuple):
    placement: str
    preset: str = "Muon"
    dtype: str = "float32"
    rounding: str = "stochastic"


class Stepped(NamedTuple):
    """Parameters with an optimizer and the gradients of each step."""

    model: nn.Module
    opt: schatten.SpectralOptimizer

    def with_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in self.model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = cut(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad

    def step(self, steps: Iterable[int]) -> "Stepped":
        for step in steps:
            self.with_gradients(step)
            self.opt.step()
        return self

    def values(self) -> Values:
        return {**weights(self.model), **state(self.model, self.opt)}


def stepped(run: Run, size: int) -> Stepped:
    wrap, placement = PLACEMENTS[run.placement]
    model = wrap(Parts().to(getattr(torch, run.dtype)), size)
    # Blocks of two sizes have state of their own each.
    rules = [("*thin.weight", "spectral"), ("*up.weight", "spectral", {"layout": schatten.Layout(split=(14, 7))})]
    options: dict[str, Any] = {"lr": 0.01, "rules": rules, "rounding": run.rounding}
    if placement:
        options["placement"] = placement
    if run.preset in ("Muon", "NorMuon"):
        options["solver"] = schatten.solvers.polynomial(dtype="float32")
    return Stepped(model, getattr(schatten.presets, run.preset)(model, **options))
