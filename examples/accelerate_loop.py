"""accelerate: prepare, accumulate, clip, save and load. The optimizer is built on the model before `prepare`."""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import schatten

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 32))
opt = schatten.Muon(model, lr=1e-2, weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=80)
batches = DataLoader(TensorDataset(torch.arange(32)), batch_size=8, shuffle=True)
model, opt, batches, scheduler = accelerator.prepare(model, opt, batches, scheduler)


def loss(tokens):
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)


def train(epochs):
    for _ in range(epochs):
        for (tokens,) in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss(tokens))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()


everything = torch.arange(32)
before = loss(everything).item()
train(20)
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
train(20)
# The prepared optimizer wraps the preset, which is reached as `.optimizer`.
print("skipped for a gradient that was not finite:", opt.optimizer.metrics()["skipped_total"])
print(f"loss before {before:.3f}, after {loss(everything).item():.3f}")
