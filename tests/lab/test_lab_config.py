"""A comparison's configuration: what is refused, the schedule, the grid, equal terms for all optimizers."""

import itertools

import pytest
import torch

from schatten.lab import optimizers
from schatten.lab.commands import grids
from schatten.lab.config import CompareConfig
from schatten.lab.errors import InputError
from schatten.lab.models import GPT, GPTConfig

LRS = {"adamw": (1e-3,), "muon": (1e-3,)}


def make(**options):
    return CompareConfig(**{"lrs": LRS, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": ("adamw", "adamv"), "lrs": {"adamw": (1e-3,), "adamv": (1e-3,)}}, "no 'adamv': known are adamw, "),
        ({"lrs": {"adamw": (1e-3, 0.0), "muon": (1e-3,)}}, "positive and finite, got 0 for adamw"),
        ({"lrs": {"adamw": (1e-3,), "muon": (-1e-3,)}}, "got -0.001 for muon"),
        ({"lrs": {"adamw": (1e-3,), "muon": (float("inf"),)}}, "got inf for muon"),
        ({"lrs": {"adamw": (1e-3,)}}, "no learning rate for muon"),
        ({"lrs": {**LRS, "lion": (1e-3,)}}, "names lion"),
        ({"optimizers": ("muon", "muon")}, "each optimizer once"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"width": 130}, "multiple of --heads"),
        ({"warmup": 300}, "--warmup"),
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"beta2": 1.0}, "--beta2"),
        ({"final_lr": 1.5}, "--final-lr"),
        ({"schedule": "step"}, "--schedule must be one of cosine, linear"),
        ({"mixed_precision": "fp8"}, "--mixed-precision"),
        ({"trackers": ("nothing",)}, "--trackers has no nothing"),
    ],
)
def test_wrong_values_are_refused_by_option(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_rises_to_the_peak_and_falls_to_the_final_share(schedule):
    config = make(steps=1000, warmup=100, schedule=schedule, final_lr=0.1)
    factors = [config.lr_factor(step) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 101)
    assert max(factors) == factors[100] == 1.0
    # The last step is one short of the end: cosine is flat there, linear has 1/360 of its slope left.
    assert factors[-1] == pytest.approx(0.1, abs=0.9 / 360 + 1e-9)
    assert all(a >= b for a, b in itertools.pairwise(factors[100:]))


def test_warm_up_is_a_twentieth_of_the_steps_unless_given():
    assert make(steps=300).warmup == 15
    assert make(steps=300, warmup=0).lr_factor(0) == 1.0


def test_a_grid_with_a_name_replaces_the_common_one():
    assert grids(["1e-3,2e-3", "muon=4e-3"], ("adamw", "muon")) == {"adamw": (1e-3, 2e-3), "muon": (4e-3,)}
    with pytest.raises(InputError, match="takes numbers"):
        grids(["fast"], ("adamw",))


@pytest.mark.parametrize("name", sorted(optimizers.known()))
def test_all_optimizers_get_the_same_terms(name):
    model = GPT(GPTConfig(31, 12, 2, 2, 16))
    built = optimizers.build(name, model, lr=2e-3, weight_decay=0.3, betas=(0.9, 0.99))
    decays = {p: group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert set(decays) == set(model.parameters())
    own = name != "adamw" and optimizers.contestants()[name].preset in optimizers.OWN_DECAY
    assert all(decay == (0.0 if p.ndim < 2 else 0.3) for p, decay in decays.items()) or own
    spectral = [group for group in built.param_groups if group.get("algorithm") == "spectral"]
    assert {group["lr"] for group in spectral or built.param_groups} == {2e-3}
    # Presets whose lr is in other units than AdamW's leave it at theirs.
    assert {group["lr"] for group in built.param_groups} <= {2e-3, getattr(built, "adamw_lr", None) or 2e-3}
    assert {group["betas"] for group in built.param_groups if group.get("algorithm", "adamw") == "adamw"} <= {(0.9, 0.99)}


@pytest.mark.parametrize("name", sorted(optimizers.known()))
def test_every_optimizer_has_a_documented_lr_and_builds_with_its_own_decay(name):
    model = GPT(GPTConfig(31, 12, 1, 2, 16))
    lr = optimizers.default_lr(name)
    built = optimizers.build(name, model, lr=lr, weight_decay=None, betas=(0.9, 0.99))
    assert built.param_groups[0]["lr"] == lr > 0


def test_all_and_all_source_stand_for_lists_that_exist():
    assert set(optimizers.named("all-source")) <= set(optimizers.known())
    assert optimizers.named("all") == tuple(optimizers.known())
    assert optimizers.named("AdamW, muon") == ("adamw", "muon")


def test_default_lrs_are_those_of_the_presets():
    assert grids(["default"], ("muon", "msgd")) == {"muon": (1e-3,), "msgd": (5.0,)}
    assert grids(["2e-3", "lion=default"], ("muon", "lion")) == {"muon": (2e-3,), "lion": (1e-4,)}


def test_bounds_are_the_shape_factor_over_the_decay():
    model = GPT(GPTConfig(31, 12, 1, 2, 16))
    built = optimizers.build("muon", model, lr=1e-3, weight_decay=0.5, betas=(0.9, 0.99))
    bounds = optimizers.bounds(built)
    assert bounds["blocks.0.up.weight"] == pytest.approx(0.2 * 64**0.5 / 0.5)
    assert "tokens.weight" not in bounds
    adamw = torch.optim.AdamW(model.parameters())
    assert optimizers.bounds(adamw) == {}
