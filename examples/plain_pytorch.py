"""A training loop of one's own: build on the module, look at the plan, clip, schedule, save and load."""

import io

import torch
from torch import nn

import schatten

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))
opt = schatten.Muon(model, lr=1e-2, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
print(opt.plan)

tokens = torch.arange(32)


def loss():
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)


def train(steps):
    for _ in range(steps):
        opt.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()


before = loss().item()
train(50)

# Tensors and plain values only, so a safe load reads it.
file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
file.seek(0)
saved = torch.load(file, weights_only=True)
model.load_state_dict(saved["model"])
opt.load_state_dict(saved["optimizer"])
scheduler.load_state_dict(saved["scheduler"])

train(50)
print(f"loss before {before:.3f}, after {loss().item():.3f}")
