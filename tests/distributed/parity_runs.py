"""The parity model trained ten steps on one process and in every placement, as `tests/distributed/ranks.py` runs it.

A run is told in plain values: (placement, preset, solver's dtype, weights' dtype).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.placements import ways
from tests.distributed.parity_model import GPT, RULES, Block, Stem, loss, whole

STEPS = 10

# Of the relative difference from one process. Sums of gradients in another order differ by 1e-7 of the largest entry, and a
# direction by some times that where singular values are small; bf16 products and weights begin with 4e-3.
BOUNDS = {"fp32": 1e-5, "bf16 products": 1e-2, "bf16 weights": 0.2}

Run = tuple[str, str, str, str]

Weights = dict[str, Tensor]

# What is to be trained, with the rank and the number of ranks that the batch is split over.
Placed = tuple[nn.Module, int, int]


def one(model: GPT, rank: int, size: int) -> Placed:
    return model, 0, 1


def ddp(model: GPT, rank: int, size: int) -> Placed:
    return DistributedDataParallel(model), rank, size


def fsdp(model: GPT, rank: int, size: int) -> Placed:
    return _sharded(model, init_device_mesh("cpu", (size,))), rank, size


def hsdp(model: GPT, rank: int, size: int) -> Placed:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    return _sharded(model, mesh), rank, size


def tensor_parallel(model: GPT, rank: int, size: int) -> Placed:
    return _parallel(model, init_device_mesh("cpu", (size,))), 0, 1


def fsdp_and_tensor_parallel(model: GPT, rank: int, size: int) -> Placed:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    return _sharded(_parallel(model, mesh["tensor"]), mesh["data"]), mesh.get_local_rank("data"), 2


def _sharded(model: GPT, mesh: Any) -> GPT:
    for module in model.modules():
        if isinstance(module, (Stem, Block)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _parallel(model: GPT, mesh: Any) -> GPT:
    """Linear layers by rows or columns, experts by the expert; what is small is on every rank, as are all inputs."""
    for block in model.blocks:
        styles: dict[str, Any] = {
            "attn.c_attn": ColwiseParallel(output_layouts=Replicate()),
            "attn.c_proj": RowwiseParallel(input_layouts=Replicate()),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, {name: style for name, style in styles.items() if _has(block, name)})
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    experts = cast(nn.Module, model.blocks[1].mlp)
    for name in ("w1", "w2"):
        experts.register_parameter(name, nn.Parameter(distribute_tensor(getattr(experts, name).detach(), mesh, [Shard(0)])))
    return model


def _has(block: nn.Module, name: str) -> bool:
    return any(own == name for own, _ in block.named_modules())


class Placement(NamedTuple):
    """How a model is wrapped, the `placement` that its optimizer is given, and on how many ranks.

    `together` says whether matrices that are cut stay where they are: None leaves it to the model of their cost.
    """

    wrap: Callable[[GPT, int, int], Placed]
    option: str | None = None
    sizes: tuple[int, ...] = (1, 2, 3, 4)
    together: bool | None = False


PLACEMENTS = {
    "one process": Placement(one, sizes=(1,)),
    "DDP": Placement(ddp, sizes=(2,), together=None),
    "DDP, local": Placement(ddp, "local"),
    "DDP, owners": Placement(ddp, "owners"),
    "DDP, zero1": Placement(ddp, "zero1"),
    "FSDP2": Placement(fsdp),
    "FSDP2, together": Placement(fsdp, sizes=(2, 3, 4), together=True),
    "HSDP": Placement(hsdp, sizes=(2, 4)),
    "tensor parallel": Placement(tensor_parallel),
    "tensor parallel, together": Placement(tensor_parallel, sizes=(2, 3, 4), together=True),
    "FSDP2 and tensor parallel": Placement(fsdp_and_tensor_parallel, sizes=(2, 4)),
}


def on(size: int) -> list[str]:
    """The placements that are there on so many ranks."""
    return [name for name, placement in PLACEMENTS.items() if size in placement.sizes and name != "one process"]


def build(preset: str, model: nn.Module, dtype: str, placement: str | None) -> schatten.SpectralOptimizer:
    make = getattr(schatten.presets, preset)
    options: dict[str, Any] = {"placement": placement} if placement else {}
    if "solver" in inspect.signature(make).parameters and dtype != "default":
        options["solver"] = schatten.solvers.polynomial(dtype=dtype)
    # Hyperball keeps norms, which decay would change.
    return make(model, lr=1e-2, weight_decay=0.0 if preset == "Hyperball" else 0.1, rules=RULES, **options)


def trained(run: Run, rank: int, size: int) -> Weights:
    """All weights after the steps, each whole."""
    name, preset, dtype, weights = run
    placement = PLACEMENTS[name]
    model, part, parts = placement.wrap(GPT().to(getattr(torch, weights)), rank, size)
    asked = mock.Mock(wraps=ways.cheaper) if placement.together is None else mock.Mock(return_value=placement.together)
    with mock.patch.object(ways, "cheaper", asked):
        opt = build(preset, model, dtype, placement.option)
        for step in range(STEPS):
            loss(model, step, part, parts).backward()
            opt.step()
            opt.zero_grad()
    # Or what is said to be computed together was not.
    assert asked.called or not placement.together
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    return {name: whole(p.detach()).clone() for name, p in named.items()}


def of_rank(rank: int, size: int, runs: Sequence[Run]) -> list[Weights]:
    return [trained(run, rank, size) for run in runs]


def difference(found: Weights, expected: Weights) -> float:
    """The largest difference of a weight from one process's, relative to the parameter's largest, over all parameters."""
    assert found.keys() == expected.keys()
    return max(float((found[k].double() - W.double()).abs().max() / W.double().abs().max()) for k, W in expected.items())


def identical(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)
