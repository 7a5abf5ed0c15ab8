"""Parameters of every layout as DTensors, stepped with given gradients: what a placement changes beyond sums of gradients.

Where gradients come from a batch that ranks share, their rounding differs from one process's, and rules that keep an
eigenbasis make that as large as any entry. Given gradients are the same bits, so every preset can be compared.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import schatten
from schatten.placements import ways

STEPS = 3

# On two to four ranks some of these have uneven, some empty shards.
SHAPES: dict[str, tuple[tuple[int, ...], str | schatten.Layout]] = {
    "tall": ((9, 5), "auto"),
    "wide": ((5, 9), "auto"),
    "wide too": ((5, 9), "auto"),
    "fused": ((12, 4), schatten.Layout(split=3)),
    "unequal": ((11, 4), schatten.Layout(split=(5, 3, 3))),
    "columns": ((4, 6), schatten.Layout(heads=2, axis="fan_in")),
    "transposed": ((7, 4), schatten.Layout(transpose=True)),
    "experts": ((3, 6, 4), "experts"),
    "convolution": ((6, 4, 3), "conv"),
    "positions": ((4, 3, 2), "positions"),
    "row": ((1, 8), "auto"),
    "three": ((3, 8), "auto"),
}


class Mesh(NamedTuple):
    """Where a tensor is on each dimension of a mesh, and whether the cost of what can be computed where it lies is said to be
    less or more than that of sending it to an owner.
    """

    sizes: tuple[int, ...]
    placements: tuple[Shard | Replicate, ...]
    stays: bool = False


MESHES = {
    "one process": Mesh((), ()),
    "rows of two": Mesh((2,), (Shard(0),)),
    "rows of two that stay": Mesh((2,), (Shard(0),), stays=True),
    "rows of three": Mesh((3,), (Shard(0),)),
    "columns of two": Mesh((2,), (Shard(1),)),
    "columns of two that stay": Mesh((2,), (Shard(1),), stays=True),
    "copies": Mesh((2,), (Replicate(),)),
    "copies that stay": Mesh((2,), (Replicate(),), stays=True),
    "copies of rows": Mesh((2, 2), (Replicate(), Shard(0))),
    "rows and columns": Mesh((2, 2), (Shard(0), Shard(1))),
}

# A preset with options of its own.
Run = tuple[str, str, dict[str, Any]]


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(
    preset: str, mesh: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, nn.Parameter], schatten.SpectralOptimizer]:
    shapes = {name: shape for name, (shape, _) in SHAPES.items()} | {"bias": (7,)}
    params = {name: nn.Parameter(placed(drawn(shape, i).to(dtype), mesh)) for i, (name, shape) in enumerate(shapes.items())}
    groups: list[dict[str, Any]] = [{"params": [(k, params[k])], "layout": layout} for k, (_, layout) in SHAPES.items()]
    groups.append({"params": [("bias", params["bias"])], "algorithm": "adamw"})
    return params, getattr(schatten.presets, preset)(groups, **options)


# Each mesh of several dimensions makes process groups.
@cache
def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def placed(t: Tensor, mesh: str) -> Tensor:
    sizes, placements, _ = MESHES[mesh]
    if not sizes:
        return t
    where = [Shard(0) if isinstance(p, Shard) and p.dim >= t.ndim else p for p in placements]
    # A vector that is sharded once is whole on the other dimension.
    where = [Replicate() if p in where[:i] else p for i, p in enumerate(where)]
    return distribute_tensor(t, mesh_of(*sizes), where, src_data_rank=None)


def stepped(run: Run, mesh: str) -> dict[str, tuple[Tensor, list[int | None]]]:
    """Of each weight and each tensor of state this rank's part, and for each dimension of its mesh the one that is cut."""
    preset, precision, options = run
    # What the model of their cost says of matrices so small is no part of this.
    asked = mock.Mock(return_value=MESHES[mesh].stays)
    with mock.patch.multiple(ways, cheaper=asked, replicate=asked):
        params, opt = start(preset, mesh, options, getattr(torch, precision))
        for step in range(STEPS):
            for i, p in enumerate(params.values()):
                p.grad = placed(drawn(p.shape, 100 * (step + 1) + i).to(p.dtype), mesh)
            opt.step()
    # Or what is said to stay did not.
    assert asked.called or not MESHES[mesh].stays or preset != "Muon"
    state = {f"{name}, {key}": value for name, p in params.items() for key, value in opt.state[p].items()}
    return {name: _held(t.detach()) for name, t in {**params, **state}.items()}


def _held(t: Tensor) -> tuple[Tensor, list[int | None]]:
    if not isinstance(t, DTensor):
        return t.clone(), []
    return t.to_local().clone(), [p.dim if isinstance(p, Shard) else None for p in t.placements]


def part(t: Tensor, cut: Sequence[int | None], mesh: str, rank: int) -> Tensor:
    """What a rank holds of a whole tensor that is cut so."""
    sizes = MESHES[mesh].sizes
    for i, (dim, size) in enumerate(zip(cut, sizes, strict=False)):
        own = rank // math.prod(sizes[i + 1 :]) % size
        if dim is not None:
            chunks = t.chunk(size, dim)
            t = chunks[own] if own < len(chunks) else t.narrow(dim, 0, 0)
    return t


def of_rank(rank: int, size: int, runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, Any]]]:
    """The outcome of runs for each mesh."""
    return {mesh: [stepped(run, mesh) for run in own] for mesh, own in runs.items()}
