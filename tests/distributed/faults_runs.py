"""Ranks that differ: in the gradients they have, in what they were told, in their numbers, and by having died."""

import time
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import schatten
from tests.distributed.collectives import Collectives
from tests.distributed.parity_model import whole

SHAPES = {"a": (6, 4), "b": (5, 3), "bank": (3, 4, 2), "vector": (7,)}

STEPS = 4

# Parameters on their ranks: shards, shards with copies, and copies that share the work in two ways.
KINDS = ("sharded", "copies of shards", "owners", "zero1")


# Another precision travels in a bucket of its own.
DOUBLE = "b"


def drawn(name: str, seed: int) -> Tensor:
    t = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(100 * seed + len(name)))
    return t.double() if name == DOUBLE else t


# Each mesh of several dimensions makes process groups.
@cache
def mesh_of(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def placed(t: Tensor, kind: str, size: int) -> Tensor:
    if kind == "sharded":
        return distribute_tensor(t, mesh_of(size), [Shard(0)], src_data_rank=None)
    if kind == "copies of shards":
        return distribute_tensor(t, mesh_of(2, size // 2), [Replicate(), Shard(0)], src_data_rank=None)
    return t


Params = dict[str, nn.Parameter]


def start(kind: str, size: int = 1, **options: Any) -> tuple[Params, schatten.SpectralOptimizer]:
    params = {name: nn.Parameter(placed(drawn(name, 0), kind, size)) for name in SHAPES}
    groups: list[dict[str, Any]] = [
        {"params": [("a", params["a"]), ("b", params["b"])]},
        {"params": [("bank", params["bank"])], "layout": "experts"},
        {"params": [("vector", params["vector"])], "algorithm": "adamw"},
    ]
    if kind in ("owners", "zero1"):
        options["placement"] = kind
    solver = schatten.solvers.polynomial(dtype="float32")
    return params, schatten.NorMuon(groups, solver=solver, lr=0.1, weight_decay=0.1, **options)


def give(params: Params, step: int, kind: str, size: int, absent: Collection[str] = ()) -> None:
    for name, p in params.items():
        p.grad = None if name in absent else placed(drawn(name, step + 1), kind, size)


def local(t: Tensor) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach().clone()


def seen(params: Params, opt: schatten.SpectralOptimizer) -> dict[str, Any]:
    return {
        "weights": {name: whole(p.detach()).clone() for name, p in params.items()},
        "steps": {name: int(opt.state[p]["step"]) for name, p in params.items()},
        "skipped": {name: int(opt.state[p]["skipped"]) for name, p in params.items()},
    }


def absent(step: int, rank: int) -> list[str]:
    """Another parameter on each rank at one step, all on one rank at the next, one on all ranks at the last."""
    names = list(SHAPES)
    return {1: [names[rank]], 2: names if rank == 1 else [], 3: ["b"]}.get(step, [])


def missing(rank: int, size: int, kind: str) -> dict[str, Any]:
    params, opt = start(kind, size)
    for step in range(STEPS):
        give(params, step, kind, size, absent(step, rank))
        opt.step()
    return seen(params, opt)


def not_finite(rank: int, size: int, kind: str) -> dict[str, Any]:
    """Rank 1 has a nan in its shard of a matrix, of the bank and of the vector, each at one step, and no one else has."""
    params, opt = start(kind, size)
    for step, name in enumerate([None, "a", "bank", "vector"]):
        give(params, step, kind, size)
        if rank == 1 and name is not None and (grad := params[name].grad) is not None:
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[0] = torch.nan
        opt.step()
    return seen(params, opt)


Fault = Callable[[Params, schatten.SpectralOptimizer], None]


def negative_lr(params: Params, opt: schatten.SpectralOptimizer) -> None:
    opt.param_groups[0]["lr"] = -1.0


def other_decay(params: Params, opt: schatten.SpectralOptimizer) -> None:
    opt.param_groups[0]["weight_decay"] = 0.2


def other_lr(params: Params, opt: schatten.SpectralOptimizer) -> None:
    opt.param_groups[2]["lr"] = 0.05


def sparse_gradient(params: Params, opt: schatten.SpectralOptimizer) -> None:
    params["vector"].grad = torch.zeros(SHAPES["vector"]).to_sparse()


FAULTS: dict[str, tuple[Fault, Collection[str]]] = {
    "negative lr": (negative_lr, KINDS),
    "another decay": (other_decay, KINDS),
    "another lr of AdamW": (other_lr, KINDS),
    "sparse gradient": (sparse_gradient, ("owners", "zero1")),
}


def refused(rank: int, size: int, kind: str, fault: str) -> dict[str, Any]:
    """What each rank was told when rank 1 alone was at fault, what moved, and the step after it is mended."""
    params, opt = start(kind, size)
    give(params, 0, kind, size)
    opt.step()
    before = {name: local(p) for name, p in params.items()}
    saved = [dict(group) for group in opt.param_groups]
    give(params, 1, kind, size)
    if rank == 1:
        FAULTS[fault][0](params, opt)
    told = _told(opt.step)
    unchanged = all(torch.equal(local(p), before[name]) for name, p in params.items())
    for group, own in zip(opt.param_groups, saved, strict=True):
        group.update({key: own[key] for key in ("lr", "weight_decay")})
    give(params, 1, kind, size)
    again = _told(opt.step)
    return {"told": told, "unchanged": unchanged, "again": again, **seen(params, opt)}


def _told(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def of_rank(rank: int, size: int, kinds: Collection[str]) -> dict[str, Any]:
    return {
        kind: {
            "missing": missing(rank, size, kind),
            "not finite": not_finite(rank, size, kind),
            **{fault: refused(rank, size, kind, fault) for fault, (_, may) in FAULTS.items() if kind in may},
        }
        for kind in kinds
    }


def collectives(rank: int, size: int, kind: str) -> int:
    """How many a step has."""
    params, opt = start(kind, size)
    give(params, 0, kind, size)
    with Collectives() as seen:
        opt.step()
    return len(seen.seen)


def dying(rank: int, size: int, kind: str, fatal: int) -> dict[str, Any]:
    """Rank 1 dies in the second step at its collective number `fatal`; the others tell how they failed, and when."""
    params, opt = start(kind, size)
    give(params, 0, kind, size)
    opt.step()
    before = {name: local(p) for name, p in params.items()}
    give(params, 1, kind, size)
    begun = time.monotonic()
    with Collectives(fatal if rank == 1 else None):
        told = _told(opt.step)
    unchanged = all(torch.equal(local(p), before[name]) for name, p in params.items())
    return {"told": told, "seconds": time.monotonic() - begun, "unchanged": unchanged}


def hanging(rank: int, size: int, kind: str, seconds: float) -> dict[str, Any]:
    """Rank 1 never comes to its step."""
    params, opt = start(kind, size)
    before = {name: local(p) for name, p in params.items()}
    give(params, 0, kind, size)
    begun = time.monotonic()
    if rank == 1:
        time.sleep(seconds)
        return {}
    told = _told(opt.step)
    unchanged = all(torch.equal(local(p), before[name]) for name, p in params.items())
    return {"told": told, "seconds": time.monotonic() - begun, "unchanged": unchanged}
