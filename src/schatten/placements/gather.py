"""Gather: whole tensors, and norms over all ranks, for what looks at a training from outside a step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from schatten.placements.local import plain


def whole(t: Tensor) -> Tensor:
    """All of a DTensor, on the device of this rank's part; every rank of its mesh must call this. Any other tensor as it is."""
    if not isinstance(t, DTensor):
        return t
    own, mesh = plain(t.detach()), t.device_mesh
    # What is offloaded to the host travels on the mesh's devices.
    there = own.to(mesh.device_type)
    shared = DTensor.from_local(there, mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())
    return shared.full_tensor().to(own.device)


def counts_here(p: Tensor) -> bool:
    """Whether sums over ranks take this rank's part of a parameter: that of the first of several copies."""
    if not isinstance(p, DTensor):
        return True
    coordinate = p.device_mesh.get_coordinate()
    assert coordinate is not None
    return not any(at for at, placement in zip(coordinate, p.placements, strict=True) if placement.is_replicate())


def total_norms(parts: Sequence[Sequence[tuple[Tensor, Tensor]]], order: float) -> list[Tensor]:
    """The norm of each part as one vector, fp64, from pairs of a parameter and the norm of what this rank has of it.

    On DTensors every rank of their meshes must call this, with the same parameters: one gathering of `len(parts)` numbers for
    each mesh. Nothing waits for a device.
    """
    by_mesh: dict[DeviceMesh | None, list[list[Tensor]]] = {}
    for i, part in enumerate(parts):
        for p, norm in part:
            mesh = p.device_mesh if isinstance(p, DTensor) else None
            own = by_mesh.setdefault(mesh, [[] for _ in parts])
            own[i].append(norm if counts_here(p) else torch.zeros_like(norm))
    totals: list[list[Tensor]] = [[] for _ in parts]
    for mesh, own in by_mesh.items():
        found = [_norm(norms, order) for norms in own]
        if mesh is not None:
            row = torch.stack([t.to(mesh.device_type) for t in found]).unsqueeze(0)
            rows = DTensor.from_local(row, mesh, [Shard(0)] * mesh.ndim, run_check=False).full_tensor()
            found = list(torch.linalg.vector_norm(rows, order, dim=0))
        for total, t, norms in zip(totals, found, own, strict=True):
            total += [t] if norms else []
    return [_norm(total, order) for total in totals]


def _norm(norms: Sequence[Tensor], order: float) -> Tensor:
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([t.to(norms[0].device).double() for t in norms]), order)
