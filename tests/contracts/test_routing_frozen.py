"""Frozen parameters: no plan routes them, and a group that holds nothing else is a legal group."""

import pytest
import torch
from torch import nn

import schatten


def trained_and_frozen():
    return nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4), requires_grad=False)


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_a_group_of_frozen_parameters_only_steps_and_saves(algorithm):
    # DeepSpeed PR 7869: such a group crashed.
    W, frozen = trained_and_frozen()
    opt = schatten.Muon([{"params": [frozen], "algorithm": algorithm}, {"params": [W]}], lr=0.1)
    W.grad = torch.eye(4)
    opt.step()
    assert not torch.equal(W, torch.ones(4, 4)) and torch.equal(frozen, torch.ones(4, 4))
    schatten.Muon([{"params": [frozen], "algorithm": algorithm}, {"params": [W]}], lr=0.1).load_state_dict(opt.state_dict())


def test_a_model_frozen_after_the_optimizer_was_built_stops_and_starts_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = schatten.Muon(model, lr=0.1)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    opt.step()
    assert torch.equal(model[0].weight, before) and opt.metrics()["without_gradient"] == ["0.weight", "0.bias"]


def test_parameters_frozen_at_construction_are_in_no_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    opt = schatten.Muon(model)
    assert {name for g in opt.param_groups for name in g["param_names"]} == {"1.weight", "1.bias"}
    assert opt.plan.frozen == 2
