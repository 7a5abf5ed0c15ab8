"""Tensor parallel: weights split by column and by row, stepped as the whole matrices that they are.

Start it by `torchrun --nproc-per-node 2 examples/tensor_parallel.py`.
"""

import copy
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import schatten

if "LOCAL_RANK" not in os.environ:
    sys.exit("This is for several processes: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("tp",))

torch.manual_seed(0)
layers = {"table": nn.Embedding(32, 16), "up": nn.Linear(16, 64), "down": nn.Linear(64, 16), "out": nn.Linear(16, 32)}
single = nn.ModuleDict(layers).to(device)
styles = {
    "table": RowwiseParallel(input_layouts=Replicate()),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "out": ColwiseParallel(output_layouts=Replicate()),
}
model = parallelize_module(copy.deepcopy(single), mesh, styles)

tokens = torch.arange(32, device=device)  # the same on all ranks, which hold one model together


def loss(model):
    x = model["table"](tokens)
    x = x + model["down"](model["up"](x).relu())
    return nn.functional.cross_entropy(model["out"](x), (tokens + 1) % 32)


def train(model):
    # fp32 in the solver, so that the comparison below is not one of bf16's rounding.
    opt = schatten.Muon(model, lr=1e-2, weight_decay=0.1, solver=schatten.solvers.polynomial(tol=0.16, dtype=torch.float32))
    for _ in range(50):
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    return opt


before = loss(model).item()
opt = train(model)
after = loss(model).item()
train(single)
if rank == 0:
    print(opt.plan)

apart = max((p.full_tensor() - q).abs().max().item() for p, q in zip(model.parameters(), single.parameters(), strict=True))
assert after < before / 2, "the loss did not fall"
assert apart < 1e-3, f"weights are {apart:.1e} from those of a single device"
if rank == 0:
    print(f"{world} ranks, weights within {apart:.0e} of a single device's: loss before {before:.3f}, after {after:.3f}")
# Threads of gloo let go of their last tensors meanwhile; after Python's end that aborts the process, now and then.
time.sleep(0.1)
dist.destroy_process_group()
