"""A monitor on parameters that several ranks hold: what each rank sees, and who writes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import schatten
from schatten.monitor import Monitor
from tests.distributed.faults_runs import mesh_of
from tests.distributed.instrument_runs import give, poison, start, told, weights

KINDS = ("sharded", "copies of shards", "owners", "zero1")

QUANTITIES = ["constraint", "gradient", "momentum", "update", "alignment", "stationarity"]

STEPS = 3


def monitored(rank: int, size: int, kind: str, folder: str) -> dict[str, Any]:
    """Records of every step on each rank, weights with and without a monitor, and what was written."""
    params, opt = start(kind, size)
    file, seen = Path(folder) / f"{kind}, {rank}.jsonl", []
    with Monitor(opt, 1, QUANTITIES, to=file) as monitor:
        for step in range(STEPS):
            give(params, step, kind, size)
            if step == STEPS - 1 and rank == size - 1:
                poison(params["bank"].grad, torch.nan)
                params["tall"].grad = None
            opt.step()
            seen.append(monitor.records)
    bare, other = start(kind, size)
    for step in range(STEPS):
        give(bare, step, kind, size)
        if step == STEPS - 1 and rank == size - 1:
            poison(bare["bank"].grad, torch.nan)
            bare["tall"].grad = None
        other.step()
    both = (weights(params), weights(bare))
    same = all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    return {"records": seen, "same": same, "written": file.exists()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def batches(size: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A fixed batch, or a rank's equal share of it."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(12, 6, generator=generator).double(), torch.randn(12, 4, generator=generator).double()
    return (x, y) if rank is None else (x[rank::size], y[rank::size])


def of_loss(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return lambda: nn.functional.mse_loss(model(x), y)


def curved(rank: int, size: int, kind: str) -> list[dict[str, Any]]:
    """Curvature under DistributedDataParallel, each rank with its share of the batch, or on one process with all of it."""
    net = Net().double()
    x, y = batches(size, None if kind == "one process" else rank)
    model = net if kind == "one process" else DistributedDataParallel(net)
    opt = schatten.Muon(model, lr=0.05)
    loss = of_loss(model, x, y)
    seen: list[dict[str, Any]] = []
    with Monitor(opt, 2, ["curvature", "gradient"], model=model, loss=loss) as monitor:
        for _ in range(2):
            opt.zero_grad()
            loss().backward()
            opt.step()
        seen += monitor.records
    return [{key.removeprefix("module."): value for key, value in record.items()} for record in seen]


def overlapped(rank: int, size: int, kind: str) -> list[dict[str, Any]]:
    """Updates of steps that reach the weights in the next forward only."""
    model = Net().double()
    if kind != "one process":
        for layer in (model.up, model.down):
            fully_shard(layer)
        fully_shard(model)
    opt = schatten.Muon(model, lr=0.05)
    loss = of_loss(model, *batches(size))
    with opt.overlap(model), Monitor(opt, 2, ["update", "gradient", "constraint"]) as monitor:
        for _ in range(4):
            loss().backward()
            opt.step()
            opt.zero_grad()
    return monitor.records


def by_columns(rank: int, size: int, kind: str) -> list[dict[str, Any]]:
    """A weight cut along its columns, as tensor parallel cuts an output projection."""
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if kind != "one process":
        W, G = (distribute_tensor(t, mesh_of(size), [Shard(1)], src_data_rank=None) for t in (W, G))
    p = nn.Parameter(W)
    opt = schatten.Muon([("W", p)], lr=0.05)
    with Monitor(opt, 2, QUANTITIES) as monitor:
        for _ in range(2):
            p.grad = G
            opt.step()
    return monitor.records


def refused(rank: int, size: int) -> str | None:
    model = fully_shard(Net().double())
    opt = schatten.Muon(model)
    return told(lambda: Monitor(opt, 1, ["curvature"], model=model, loss=lambda: torch.ones(())))


def of_rank(rank: int, size: int, folder: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            **{kind: monitored(rank, size, kind, folder) for kind in KINDS},
            "DDP": curved(rank, size, "DDP"),
            "overlap": overlapped(rank, size, "FSDP2"),
            "columns": by_columns(rank, size, "columns"),
            "refused": refused(rank, size),
        }
