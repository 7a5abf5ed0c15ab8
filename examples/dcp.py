"""torch.distributed.checkpoint: model and optimizer by parameter names into a folder, and back into a new run.

The same lines run under torchrun; here one process saves alone. A layer that never got a gradient has state all the same.
"""

import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import schatten

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
tokens = torch.arange(32)


def start():
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(32, 16), "out": nn.Linear(16, 32), "unused": nn.Linear(16, 16)})
    return model, schatten.Muon(model, lr=1e-2, weight_decay=0.1)


def loss(model):
    return nn.functional.cross_entropy(model["out"](model["table"](tokens)), (tokens + 1) % 32)


def train(model, opt, steps):
    for _ in range(steps):
        loss(model).backward()
        opt.step()
        opt.zero_grad()


def state(model, opt):
    of_model, of_optimizer = get_state_dict(model, opt)
    return {"model": of_model, "optimizer": of_optimizer}


model, opt = start()
before = loss(model).item()
train(model, opt, 50)
with tempfile.TemporaryDirectory() as folder:
    dcp.save(state(model, opt), checkpoint_id=folder)
    resumed, resumed_opt = start()
    # Loading fills these tensors in place, so that every rank reads no more than its own part.
    saved = state(resumed, resumed_opt)
    dcp.load(saved, checkpoint_id=folder)
set_state_dict(resumed, resumed_opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

train(model, opt, 50)
train(resumed, resumed_opt, 50)
print("never had a gradient:", resumed_opt.metrics()["without_gradient"])
print(f"loss before {before:.3f}, after {loss(model).item():.3f}, after a resumed run {loss(resumed).item():.3f}")
