"""States: where a parameter's state lies, as DTensors that checkpoints can move between any numbers of ranks.

State with the parameter's shape is placed as the parameter is, any other is cut along its first dimension wherever the
parameter is sharded. Counters and what rounding took stay with the parameter.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from schatten.placements.local import plain
from schatten.placements.regions import Arrangement, Indices, arrangement
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
    own = t
    for dim, held in enumerate(_held(t.shape, mesh, placements)):
        if isinstance(held, range):
            own = own.narrow(dim, held.start, len(held))
        else:
            own = own.index_select(dim, torch.tensor(held, device=t.device))
    # A copy, so that the whole tensor can go.
    own = own.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())


def _held(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[Indices, ...]:
    """The indices of this rank's entries along each dimension."""
    ranks = mesh.mesh.flatten().tolist()
    return Arrangement(tuple(mesh.shape), placements).held(shape, ranks.index(dist.get_rank()))


def stray(t: Tensor, like: Tensor) -> str | None:
    """Why `t` is no part that this rank can have of a tensor, or cannot be brought to where `like` lies; None if it can.

    Such are DTensors of a file that another rank or another number of ranks has saved.
    """
    if not isinstance(t, DTensor) or t.device_mesh.size() == 1:
        return None
    mesh = t.device_mesh
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if int(mesh.mesh.max()) >= size:
        return f"is one part of {mesh.size()}, of a tensor divided among ranks, and there are {size} here"
    # A mesh keeps the coordinates that the rank has which saves it.
    if (mesh.mesh == dist.get_rank()).nonzero().tolist() != [list(mesh.get_coordinate() or ())]:
        return "is the part of another rank"
    shape, own = tuple(map(len, _held(t.shape, mesh, tuple(t.placements)))), tuple(t.to_local().shape)
    if own != shape:
        return f"is a part of shape {own}, not {shape}"
    same = isinstance(like, DTensor) and mesh == like.device_mesh
    return None if same or _has_groups(mesh) else f"lies on {mesh}, whose process groups are not here"


def _has_groups(mesh: DeviceMesh) -> bool:
    """Whether this rank reaches the others of `mesh`: one that was read from a file knows only names of process groups."""
    at = mesh.get_coordinate()
    assert at is not None
    for dim in range(mesh.ndim):
        along = mesh.mesh[(*at[:dim], slice(None), *at[dim + 1 :])]
        try:
            if dist.get_process_group_ranks(mesh.get_group(dim)) != along.tolist():
                return False
        except RuntimeError:
            return False
    return True


def placed_as(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh tensor with the values of `t` in `dtype`, placed as `like`; a plain `t` must be the same on every rank.

    Sends nothing unless `t` is a DTensor that lies elsewhere; then every rank of its mesh must come here.
    """
    if not isinstance(like, DTensor):
        return _copy(whole_of(t, like), dtype, like.device)
    device = plain(like).device
    if isinstance(t, DTensor) and t.device_mesh == like.device_mesh and t.placements == like.placements:
        return _divided(_copy(t.to_local(), dtype, device), like, like.device_mesh)
    return cut(whole_of(t, like).to(device, dtype), like.device_mesh, tuple(like.placements))


def whole_of(t: Tensor, like: Tensor | None = None) -> Tensor:
    """All of a tensor, on every rank of its mesh, all of which must ask for it; a plain tensor as it is.

    If `like` lies on the same mesh it is asked for there: a mesh that was read from a file may not find its process groups.
    """
    if not isinstance(t, DTensor):
        return t
    # One rank needs no process group, and a file of it may be read without.
    if t.device_mesh.size() == 1:
        return t.to_local()
    if isinstance(like, DTensor) and t.device_mesh == like.device_mesh:
        t = _divided(t.to_local(), t, like.device_mesh)
    # What is offloaded to the host travels between devices.
    t = t.to(t.device_mesh.device_type)
    assert isinstance(t, DTensor)
    return t.full_tensor()


def _divided(own: Tensor, as_in: DTensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(own, mesh, as_in.placements, run_check=False, shape=as_in.shape, stride=as_in.stride())


def _copy(t: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(t.shape, dtype=dtype, device=device).copy_(t)


__all__ = ["arranged", "arrangement", "cut", "like_parameter", "placed_as", "sharded", "stray", "whole_of"]
