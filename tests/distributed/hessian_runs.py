"""Measuring under DistributedDataParallel: products with the Hessian of the global batch, and training that must not notice."""

from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.diagnostics import hessian
from schatten.diagnostics.curvature import curvature
from schatten.diagnostics.hessian import Hessian
from schatten.diagnostics.undisturbed import undisturbed

STEPS, BATCH = 4, 4


def model(norm: bool) -> nn.Sequential:
    torch.manual_seed(7)
    middle: list[nn.Module] = [nn.BatchNorm1d(5), nn.Dropout(0.2)] if norm else []
    return nn.Sequential(nn.Linear(6, 5), *middle, nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(BATCH, 6, generator=generator, dtype=torch.float64), torch.randint(3, (BATCH,), generator=generator)


def loss(net: nn.Module, *parts: tuple[Tensor, Tensor]) -> Tensor:
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return nn.functional.cross_entropy(net(x), y)


def directions(net: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in net.parameters()]


def measured(net: nn.Module, *parts: tuple[Tensor, Tensor]) -> dict[str, Any]:
    params = list(net.parameters())
    H = Hessian(lambda: loss(net, *parts), params, model=net)
    C = curvature(lambda v: H.within(0, v), H.gradient[0], iterations=8)
    products = H(directions(net))
    return {"loss": H.loss, "gradient": H.gradient, "product": products, "J": C.J, "L": C.L.value, "mistake": H.mistake()}


@contextmanager
def forgetful(net: nn.Module, *args: Any):
    """`undisturbed` that leaves the turn of broadcasting buffers as a forward without gradients' reduction leaves it."""
    with undisturbed(net, *args):
        yield
    if isinstance(net, DistributedDataParallel):
        net.require_forward_param_sync = False


def trained(rank: int, when: str | None) -> dict[str, Any]:
    """Weights, buffers and draws of one rank after some steps on its own batches; measured, or not, at `when`."""
    net = DistributedDataParallel(model(norm=True))
    torch.manual_seed(rank)
    opt = schatten.Muon(net, lr=0.05, weight_decay=0.1)
    for step in range(STEPS):
        if when == "before":
            measured(net, batch(50 + step, rank))
        value = loss(net, batch(step, rank))
        if when == "after forward":
            measured(net, batch(50 + step, rank))
        opt.zero_grad()
        value.backward()
        if when == "after backward":
            measured(net, batch(50 + step, rank))
        opt.step()
    weights = {n: p.detach() for n, p in net.named_parameters()}
    return {"weights": weights, "buffers": dict(net.named_buffers()), "drawn": torch.rand(3)}


def of_rank(rank: int, size: int) -> dict[str, Any]:
    net = DistributedDataParallel(model(norm=False))
    own = measured(net, batch(0, rank))
    halves = [tuple(t[part] for t in batch(0, rank)) for part in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))]
    H = Hessian([lambda half=half: loss(net, half) for half in halves], list(net.parameters()), model=net)
    own["product of micro-batches"] = H(directions(net))
    assert all(p.grad is None for p in net.parameters())
    runs = {str(when): trained(rank, when) for when in (None, "before", "after forward", "after backward")}
    with mock.patch.object(hessian, "undisturbed", forgetful):
        runs["forgetful"] = trained(rank, "after backward")
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (size,)), [Shard(0)]))
    try:
        Hessian(lambda: sharded.full_tensor().sum(), [sharded])
        refusal = None
    except TypeError as error:
        refusal = str(error)
    return {"measured": own, "refusal": refusal, **runs}
