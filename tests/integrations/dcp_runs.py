"""A model with a layer that never gets a gradient, its training, and `torch.distributed.checkpoint` folders of it."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import schatten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.hidden = nn.Linear(4, 6)
        self.unused = nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 2

    def forward(self, indices):
        return self.out(self.hidden(self.table(indices)))


def start(preset=schatten.Muon, **options):
    model = Net()
    return model, preset(model, **{"lr": 0.05, **options})


def train(model, opt, steps, rank=0):
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        model(torch.randint(0, 5, (8,), generator=generator)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def save(model, opt, folder, options=None):
    of_model, of_opt = get_state_dict(model, opt, options=options)
    dcp.save({"model": of_model, "optimizer": of_opt}, checkpoint_id=str(folder))


def load(model, opt, folder, options=None):
    """As torch's tutorial has it: an optimizer's own state_dict is filled in place from the folder, then set."""
    of_model, of_opt = get_state_dict(model, opt, options=options)
    saved = {"model": of_model, "optimizer": of_opt}
    dcp.load(saved, checkpoint_id=str(folder))
    set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def of_rank(rank, size, folder):
    """Trains under DDP, saves, resumes from `folder`, and returns the weights then and without the interruption."""

    def wrapped():
        model, opt = start()
        return DistributedDataParallel(model, find_unused_parameters=True), opt

    model, opt = wrapped()
    train(model, opt, range(3), rank)
    saved = values(model)
    save(model, opt, folder)
    train(model, opt, range(3, 6), rank)
    twin, twin_opt = wrapped()
    load(twin, twin_opt, folder)
    train(twin, twin_opt, range(3, 6), rank)
    return {"saved": saved, "uninterrupted": values(model), "resumed": values(twin)}
