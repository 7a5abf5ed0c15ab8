"""DistributedDataParallel: build on the wrapped model, and ranks share the work of a step where that pays.

Start it by `torchrun --nproc-per-node 2 examples/ddp.py`.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import schatten

if "LOCAL_RANK" not in os.environ:
    sys.exit("This is for several processes: torchrun --nproc-per-node 2 examples/ddp.py")
gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32)).to(device)
model = DistributedDataParallel(model, device_ids=[device.index] if gpus else None)
opt = schatten.Muon(model, lr=1e-2, weight_decay=0.1)
if rank == 0:
    print(opt.plan)

tokens = torch.arange(32, device=device)[rank::world]  # each rank has data of its own


def loss():
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)


def mean_over_ranks():
    with torch.no_grad():
        mean = loss() / world
    dist.all_reduce(mean)
    return mean.item()


before = mean_over_ranks()
for _ in range(50):
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
after = mean_over_ranks()

weights = nn.utils.parameters_to_vector(model.parameters())
of_rank_0 = weights.detach().clone()
dist.broadcast(of_rank_0, src=0)
assert torch.equal(weights, of_rank_0), "ranks have different weights"
assert after < before / 2, "the loss did not fall"
if rank == 0:
    print(f"{world} ranks with the same weights, bit for bit: loss before {before:.3f}, after {after:.3f}")
# Threads of gloo let go of their last tensors meanwhile; after Python's end that aborts the process, now and then.
time.sleep(0.1)
dist.destroy_process_group()
