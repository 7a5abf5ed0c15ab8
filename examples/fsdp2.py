"""FSDP2: shard, build on the sharded model, clip, and save and load by torch.distributed.checkpoint.

Start it by `torchrun --nproc-per-node 2 examples/fsdp2.py`. On a mesh of two dimensions,
`init_device_mesh("cuda", (nodes, 8))`, the same lines are HSDP.
"""

import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import schatten

if "LOCAL_RANK" not in os.environ:
    sys.exit("This is for several processes: torchrun --nproc-per-node 2 examples/fsdp2.py")
gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh(device.type, (world,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def start():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(32, 16), Block(), Block(), nn.Linear(16, 32)).to(device)
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, schatten.Muon(model, lr=1e-2, weight_decay=0.1)


tokens = torch.arange(32, device=device)[rank::world]  # each rank has data of its own


def loss(model):
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)


def mean_over_ranks(model):
    with torch.no_grad():
        mean = loss(model) / world
    dist.all_reduce(mean)
    return mean.item()


def train(model, opt, steps):
    for _ in range(steps):
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


def state(model, opt):
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer}


model, opt = start()
if rank == 0:
    print(opt.plan)
before = mean_over_ranks(model)
train(model, opt, 25)

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder, src=0)  # all ranks write their parts into the folder of rank 0
dcp.save(state(model, opt), checkpoint_id=folder[0])
resumed, resumed_opt = start()
saved = state(resumed, resumed_opt)
dcp.load(saved, checkpoint_id=folder[0])
set_state_dict(resumed, resumed_opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

train(model, opt, 25)
train(resumed, resumed_opt, 25)
for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
    assert torch.equal(p.to_local(), q.to_local()), "the resumed run is another one"
after = mean_over_ranks(model)
assert after < before / 2, "the loss did not fall"
if rank == 0:
    print(f"{world} ranks, a resumed run the same bit for bit: loss before {before:.3f}, after {after:.3f}")
# Threads of gloo let go of their last tensors meanwhile; after Python's end that aborts the process, now and then.
time.sleep(0.1)
dist.destroy_process_group()
