"""Meshes: the ranks among which an optimizer's tensors are divided, and what all of them do or none.

Only DTensors say who else holds a part, so what is written here sends nothing where there are none.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def meshes(tensors: Iterable[object]) -> list[DeviceMesh]:
    """The meshes of those that are DTensors, each once, in the order in which they come."""
    return list(dict.fromkeys(t.device_mesh for t in tensors if isinstance(t, DTensor)))


def leads(own: Sequence[DeviceMesh]) -> bool:
    """Whether this rank is the first of all in these meshes, or there are none: it writes what the others only send."""
    ranks = {rank for mesh in own for rank in mesh.mesh.flatten().tolist()}
    return not ranks or dist.get_rank() == min(ranks)


def together(act: Callable[[], T], own: Sequence[DeviceMesh]) -> T:
    """What `act` returns, once it has returned on every rank of these meshes, which must all come here.

    Its error is raised on the rank that has it, RuntimeError on the others, which would otherwise go on alone or wait.
    """
    found: list[T] = []
    failure: Exception | None = None
    try:
        found.append(act())
    except Exception as error:
        failure = error
    failed = 0 if failure is None else dist.get_rank() + 1 if own else 1
    for mesh in own:
        flag = torch.tensor(failed, device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        failed = int(flag)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(
            f"Rank {failed - 1} has refused or failed; its own error says why. Nothing has changed on this rank."
        )
    return found[0]
