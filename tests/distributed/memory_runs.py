"""The peak of a step's allocations on two ranks, for each placement and two bounds."""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import schatten

SHAPE, COUNT = (384, 96), 64
BOUNDS = (1 << 22, 1 << 24)
PRESETS = {
    "Muon": lambda params, **options: schatten.Muon(params, solver=schatten.solvers.polynomial(dtype="float32"), **options),
    "NorMuon": schatten.NorMuon,
    "Hyperball": schatten.Hyperball,
}


def peak_bytes(call):
    spec = importlib.util.spec_from_file_location("common", Path(__file__).parents[2] / "benchmarks/common.py")
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    return common.peak_bytes(call)


def of_rank(rank, size):
    mesh, found = init_device_mesh("cpu", (size,)), {}
    for name, preset in PRESETS.items():
        for placement in ("sharded", "owners", "zero1"):
            for bound in BOUNDS:
                params = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(COUNT)]
                options = {"placement": placement}
                if placement == "sharded":
                    params, options = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params], {}
                for p in params:
                    if isinstance(p, DTensor):
                        p.grad = DTensor.from_local(torch.ones_like(p.to_local()), mesh, [Shard(0)])
                    else:
                        p.grad = torch.ones_like(p)
                opt = preset(params, max_batch_bytes=bound, **options)
                opt.step()
                found[name, placement, bound] = peak_bytes(opt.step)
    return found
