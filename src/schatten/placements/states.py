"""States: where a parameter's state lies, as DTensors that checkpoints can move between any numbers of ranks.

State with the parameter's shape is placed as the parameter is, any other is cut along its first dimension wherever the
parameter is sharded. Counters and what rounding took stay with the parameter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from schatten.placements.local import plain
from schatten.placements.regions import Arrangement, arrangement
from schatten.state import COUNTERS, LOST, leading


def like_parameter(p: Tensor) -> Tensor:
    """An empty, plain tensor of a parameter's whole shape, where this rank keeps its part."""
    return torch.empty(p.shape, dtype=p.dtype, device=plain(p.detach()).device)


def arranged(state: Mapping[str, Tensor], shape: torch.Size, p: DTensor) -> dict[str, Tensor]:
    """`state`, made for a whole parameter of `shape`, with each tensor cut as it lies on the mesh of `p`."""
    found = {}
    for key, t in state.items():
        if key in COUNTERS:
            found[key] = t
            continue
        dim = leading(t.shape, shape)
        placements = p.placements if t.shape == shape else cut_along(p.placements, t, dim or 0)
        found[key] = cut(t, p.device_mesh, placements)
    return found


def sharded(state: Mapping[str, Tensor], shape: torch.Size, mesh: DeviceMesh) -> dict[str, Tensor]:
    """`state` of a parameter that every rank of a one-dimensional `mesh` holds, each tensor cut along its first dimension."""
    found = dict(state)
    for key, t in state.items():
        if key not in (*COUNTERS, LOST):
            found[key] = cut(t, mesh, cut_along((Shard(0),), t, leading(t.shape, shape) or 0))
    return found


def cut_along(placements: tuple[Placement, ...], t: Tensor, dim: int) -> tuple[Placement, ...]:
    """These placements for a tensor that is cut along `dim` wherever they shard."""
    return tuple(p if p.is_replicate() else Shard(dim) if t.ndim else Replicate() for p in placements)


def cut(t: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """A DTensor of a tensor that every rank has; nothing is sent."""
    ranks = mesh.mesh.flatten().tolist()
    on = Arrangement(tuple(mesh.shape), placements)
    own = t
    for dim, held in enumerate(on.held(t.shape, ranks.index(torch.distributed.get_rank()))):
        if isinstance(held, range):
            own = own.narrow(dim, held.start, len(held))
        else:
            own = own.index_select(dim, torch.tensor(held, device=t.device))
    # A copy, so that the whole tensor can go.
    own = own.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())


def placed_as(t: Tensor, like: Tensor) -> Tensor:
    """A fresh tensor with the values of `t`, placed as `like`; a plain `t` must be whole and the same on every rank."""
    if not isinstance(like, DTensor):
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        return torch.empty(whole.shape, dtype=whole.dtype, device=like.device).copy_(whole)
    if not isinstance(t, DTensor):
        return cut(t.to(plain(like).device), like.device_mesh, tuple(like.placements))
    if t.device_mesh == like.device_mesh:
        return t.redistribute(placements=like.placements).clone()
    return cut(t.full_tensor().to(plain(like).device), like.device_mesh, tuple(like.placements))


__all__ = ["arranged", "arrangement", "cut", "like_parameter", "placed_as", "sharded"]
