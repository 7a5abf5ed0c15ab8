"""docs/learning-rate.md says which schedulers keep the ratio of two learning rates: each is run and looked at."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from schatten import Muon
from schatten.schedules import PowerCool

STEPS = 12

PAGE = Path(__file__).parents[2] / "docs" / "learning-rate.md"

SAFE = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 5, 0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [3, 9], 0.5),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.3, 5),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.1, 1.0, 5),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 2 * STEPS),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 2 * STEPS),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 5),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "PowerCool": lambda opt: PowerCool(opt, end=2 * STEPS, warmup=3),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, 1.0, 4), schedulers.CosineAnnealingLR(opt, 2 * STEPS)], milestones=[4]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.LinearLR(opt, 0.1, 1.0, 4), schedulers.ExponentialLR(opt, 0.9)]
    ),
    # The ways out that the page gives.
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, [0.02, 3e-4], total_steps=2 * STEPS, cycle_momentum=False),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, [2e-3, 3e-5], [0.02, 3e-4], 5, cycle_momentum=False),
    "SWALR": lambda opt: SWALR(opt, [2e-3, 3e-5], anneal_epochs=5),
}

# One number for all groups.
ABSOLUTE = {
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 2 * STEPS, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 2 * STEPS, eta_min=1e-3),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, factor=0.3, min_lr=1e-4),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.02, total_steps=2 * STEPS),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 0.02, 5),
    "SWALR": lambda opt: SWALR(opt, 1e-3, anneal_epochs=5),
}


def ratios(make_scheduler):
    """lr of AdamW groups over that of matrices at every step, and the momenta."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    opt = Muon(model, lr=0.02, scale="keller", adamw={"lr": 3e-4})
    assert [group["algorithm"] for group in opt.param_groups] == ["spectral", "adamw"]
    scheduler, seen = make_scheduler(opt), []
    for _ in range(STEPS):
        seen.append((opt.param_groups[1]["lr"] / opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    return zip(*seen, strict=True)


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_scheduler_multiplies_both_learning_rates_by_one_number(name):
    ratio, momentum = ratios(SAFE[name])
    assert ratio == pytest.approx([0.015] * STEPS, rel=1e-9)
    assert set(momentum) == {0.95}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_an_absolute_number_brings_the_learning_rates_together(name):
    ratio, _ = ratios(ABSOLUTE[name])
    assert max(ratio) > 1.5 * 0.015


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_cyclic_scheduler_moves_the_momentum_unless_told_not_to(name):
    _, momentum = ratios(ABSOLUTE[name])
    assert min(momentum) < 0.95


def test_the_page_names_every_scheduler_and_the_way_out_of_each():
    section = PAGE.read_text().partition("## Schedulers with two learning rates")[2].partition("\n## ")[0]
    assert not [name for name in SAFE | ABSOLUTE if name not in section]
    for name in ABSOLUTE:
        row = next(line for line in section.splitlines() if line.startswith("|") and name in line)
        assert "list" in row or "eta_min=0" in row
