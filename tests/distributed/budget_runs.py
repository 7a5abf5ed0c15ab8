"""What a step sends: optimizers on models of several sizes, and the list of their collectives."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import schatten
from tests.distributed.collectives import Collectives

WIDTH = 16

# Bytes of one matrix.
MATRIX = 4 * WIDTH * WIDTH


def stack(matrices: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(matrices)))


def fsdp(matrices: int, size: int) -> nn.Module:
    return _sharded(matrices, init_device_mesh("cpu", (size,)))


def hsdp(matrices: int, size: int) -> nn.Module:
    return _sharded(matrices, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))


def _sharded(matrices: int, mesh: Any) -> nn.Module:
    model = stack(matrices)
    fully_shard(model, mesh=mesh)
    return model


def ddp(matrices: int, size: int) -> nn.Module:
    return DistributedDataParallel(stack(matrices))


def tensor_parallel(matrices: int, size: int) -> nn.Module:
    styles: dict[str, Any] = {str(k): (RowwiseParallel if k % 2 else ColwiseParallel)() for k in range(matrices)}
    return parallelize_module(stack(matrices), init_device_mesh("cpu", (size,)), styles)


WRAPPERS: dict[str, Callable[[int, int], nn.Module]] = {
    "DDP": ddp,
    "FSDP2": fsdp,
    "HSDP": hsdp,
    "tensor parallel": tensor_parallel,
}


def muon(model: nn.Module, **options: Any) -> schatten.Muon:
    # So small that each rank of DDP would compute them all.
    if isinstance(model, DistributedDataParallel):
        options["placement"] = "owners"
    # Every layer, also the last, which a plan takes for a head.
    return schatten.Muon(model, rules=[("*weight", "spectral")], **options)


def sent(model: nn.Module, opt: torch.optim.Optimizer, without: int | None = None) -> list[tuple[str, int]]:
    """The collectives of the second step; parameter number `without` has no gradient then."""
    seen = []
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(4, WIDTH)).square().mean().backward()
        if without is not None:
            list(model.parameters())[without].grad = None
        with Collectives() as collectives:
            opt.step()
        seen = collectives.seen
    return seen


def computed(model: nn.Module, opt: torch.optim.Optimizer) -> int:
    """How many matrices' directions this rank computes in a step."""
    model(torch.randn(4, WIDTH)).square().mean().backward()
    matrices, direction = [], schatten.Rule.direction

    def counting(rule: schatten.Rule, S: Tensor, *args: Any) -> Any:
        matrices.append(S.shape[:-2].numel())
        return direction(rule, S, *args)

    with mock.patch.object(schatten.Rule, "direction", counting):
        opt.step()
    return sum(matrices)


def of_experts(size: int) -> list[tuple[str, int]]:
    """The collectives of a step on a bank whose experts are divided among the ranks."""
    mesh = init_device_mesh("cpu", (size,))
    bank, gradient = (distribute_tensor(torch.randn(5, WIDTH, 8), mesh, [Shard(0)]) for _ in range(2))
    p = nn.Parameter(bank)
    opt = schatten.Muon([{"params": [p], "layout": "experts"}])
    p.grad = gradient
    with Collectives() as collectives:
        opt.step()
    return collectives.seen


def of_rank(rank: int, size: int, wrappers: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"experts": of_experts(size)}
    for name in wrappers:
        wrap = WRAPPERS[name]
        for matrices in (4, 16):
            model = wrap(matrices, size)
            found[f"{name}, {matrices}"] = sent(model, muon(model))
            if name == "FSDP2":
                model = wrap(matrices, size)
                found[f"torch.optim.Muon, {matrices}"] = sent(model, torch.optim.Muon(model.parameters()))
        model = wrap(16, size)
        if name != "tensor parallel":
            found[f"{name}, missing"] = sent(model, muon(model), without=3 if rank else 5)
        model = wrap(16, size)
        found[f"{name}, computed"] = computed(model, muon(model))
        model = wrap(16, size)
        opt = muon(model, max_batch_bytes=8 * MATRIX)
        found[f"{name}, small"] = sent(model, opt)
        found[f"{name}, buckets"] = sum(len(crew.team.buckets) for crew in opt._ranks.crews if crew.team is not None)
    return found
