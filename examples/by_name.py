"""By name: for trainers that read the optimizer and its options from a configuration file or a command line.

python by_name.py --optimizer normuon --optim-args "lr=0.01, scale=keller"
"""

import argparse

import torch
from torch import nn

from schatten.integrations import create_optimizer

parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", default="schatten.Muon", help="a preset's name, or the path of a class")
parser.add_argument("--optim-args", default="lr=1e-2, momentum=0.9, adamw={'betas': (0.9, 0.99)}")
chosen = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))
opt = create_optimizer(chosen.optimizer, model, chosen.optim_args)
print(opt.plan)

tokens = torch.arange(32)
losses = []
for _ in range(100):
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)
    loss.backward()
    opt.step()
    losses.append(loss.item())
print(f"loss before {losses[0]:.3f}, after {losses[-1]:.3f}")

# What no preset is called or takes is refused with what is near.
for name, options in (("moun", ""), ("muon", "learning_rate=3e-3"), ("muon", "momentun=0.9")):
    try:
        create_optimizer(name, model, options)
    except (TypeError, ValueError) as error:
        print(f"{name!r} with {options!r}: {str(error).split(' It takes')[0].split(' The presets')[0]}")
