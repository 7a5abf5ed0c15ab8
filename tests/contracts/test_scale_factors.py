"""The shape factors, their names in other libraries, and that a factor multiplies the direction only."""

import inspect
import math

import pytest
import torch

from schatten import Muon, Rule, presets
from schatten.scale_names import ALIASES, NAMES
from schatten.scales import RMS, Scale
from schatten.solvers import svd
from tests.contracts.matrices import gaussian

# (fan_out, fan_in) -> factor by name, written out by hand.
TABLE = {
    (64, 16): {"adamw-rms": 1.6, "keller": 2.0, "mup": 2.0, "none": 1.0},
    (16, 64): {"adamw-rms": 1.6, "keller": 1.0, "mup": 0.5, "none": 1.0},
    (100, 100): {"adamw-rms": 2.0, "keller": 1.0, "mup": 1.0, "none": 1.0},
    (12, 3): {"adamw-rms": 0.2 * math.sqrt(12), "keller": 2.0, "mup": 2.0, "none": 1.0},
    (3, 12): {"adamw-rms": 0.2 * math.sqrt(12), "keller": 1.0, "mup": 0.5, "none": 1.0},
    (1, 1): {"adamw-rms": 0.2, "keller": 1.0, "mup": 1.0, "none": 1.0},
}

# Read in the libraries' code; `schatten.scale_names` says where.
FOREIGN = {
    "match_rms_adamw": "adamw-rms",  # torch, timm
    "original": "keller",
    "rms_norm": "adamw-rms",  # Dion, gram-newton-schulz
    "spectral_norm": "mup",
    "shape_scaling": "keller",  # Emerging-Optimizers, Megatron
    "unit_rms_norm": "mup",
    "rms_to_rms": "mup",  # timm
    "rms_rate": "adamw-rms",  # Keras, at its default
    "consistent_rms": "adamw-rms",  # optax, at the value it recommends
    "moonlight": "adamw-rms",
    "deepspeed": "keller",
}


def _options(name):
    return inspect.signature(getattr(presets, name).__init__).parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", TABLE, ids=str)
def test_the_factor_is_the_tabulated_one(shape, name):
    assert Scale(name).factor(*shape) == pytest.approx(TABLE[shape][name], rel=1e-12)
    assert Scale(name)(gaussian(2, *shape)) == Scale(name).factor(*shape)


@pytest.mark.parametrize("alias", FOREIGN)
def test_another_library_s_name_means_the_same_factor(alias):
    assert Scale(alias) == Scale(FOREIGN[alias])
    assert repr(Scale(alias)) == repr(Scale(FOREIGN[alias])) == f"Scale(name={FOREIGN[alias]!r})"
    W = torch.nn.Parameter(torch.zeros(4, 3))
    assert Muon([W], scale=alias).param_groups[0]["scale"] == FOREIGN[alias]


def test_every_alias_is_tested_and_none_is_a_name():
    assert set(ALIASES) == set(FOREIGN)
    assert not set(ALIASES) & set(NAMES)


def test_torch_s_own_factors_agree():
    for alias in ("original", "match_rms_adamw"):
        for m, n in ((64, 16), (16, 64)):
            W = torch.nn.Parameter(torch.zeros(m, n))
            adjusted = torch.optim._muon._adjust_lr(1.0, alias, torch.Size((m, n)))
            assert Muon([W], lr=1.0, scale=alias).metrics()["effective_lr"]["0.0"] == pytest.approx(adjusted, rel=1e-6)


@pytest.mark.parametrize("preset", [name for name in presets.__all__ if "scale" in _options(name)])
def test_every_preset_understands_another_library_s_name_and_prints_ours(preset):
    W = torch.nn.Parameter(torch.ones(4, 3))
    opt = getattr(presets, preset)([W], scale="unit_rms_norm")
    rule = repr(opt.rule(opt.param_groups[0]))
    assert "Scale(name='mup')" in rule and "unit_rms_norm" not in rule
    assert "unit_rms_norm" not in str(opt.plan) + str(opt.state_dict())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spectral", "Emerging-Optimizers is 'adamw-rms' with 5 times the lr .* Scion is 'mup'. Write the name it has here"),
        ("match_rms", "coeff=0.18 of deepmd is 'adamw-rms' with 0.9 times the lr and 1.11 times the decay"),
        ("torch", "adjust_lr_fn='original' of torch is 'keller'; adjust_lr_fn='match_rms_adamw' of torch is 'adamw-rms'"),
        ("kimi", "scale must be one of 'adamw-rms', 'keller', 'mup', 'none', got 'kimi'; .*: moonlight, deepspeed, original"),
        ("", "got ''"),
    ],
)
def test_an_ambiguous_or_unknown_name_is_refused(name, text):
    with pytest.raises(ValueError, match=text):
        Scale(name)
    with pytest.raises(ValueError, match=text):
        Muon([torch.nn.Parameter(torch.zeros(4, 3))], scale=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(12, 3), (3, 12)], ids=str)
def test_the_factor_multiplies_the_direction_and_not_the_decay(shape, name):
    # One step, lr 0.5, decay 0.4: W <- 0.8 W - 0.5 c U V^T. fp32 rounding of entries near 1.
    W, G = gaussian(*shape).float(), gaussian(*shape, seed=1).float()
    p = torch.nn.Parameter(W.clone())
    opt = Muon([p], lr=0.5, weight_decay=0.4, scale=name, solver=svd())
    p.grad = G
    opt.step()
    assert (p - (0.8 * W - 0.5 * TABLE[shape][name] * svd()(G))).abs().max() < 1e-6
    p.grad = torch.zeros(shape)
    opt.param_groups[0]["momentum"] = 0.0
    before = p.detach().clone()
    opt.step()
    assert (p - 0.8 * before).abs().max() < 1e-6, "without a gradient only the unscaled decay remains"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 0), (0, 5), (0, 0)], ids=str)
def test_an_empty_matrix_has_a_finite_factor(shape, name):
    # A module may have an empty layer; its metrics and descriptions must not divide by zero.
    assert 0 <= Scale(name).factor(*shape) < math.inf
    assert math.isfinite(RMS().factor(*shape)) and RMS()(torch.zeros(shape)).shape == (1, 1)
    W = torch.nn.Parameter(torch.zeros(shape))
    opt = Muon([W], scale=name)
    W.grad = torch.zeros(shape)
    opt.step()
    assert math.isfinite(opt.metrics()["effective_lr"]["0.0"])


def test_the_adamw_rms_factor_gives_updates_of_rms_one_fifth():
    # U V^T of full rank r has RMS sqrt(r / (m n)) = 1 / sqrt(max(m, n)).
    for m, n in ((64, 16), (16, 64), (32, 32)):
        D = svd()(gaussian(m, n))
        assert float((Scale()(D) * D).square().mean().sqrt()) == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_describes_the_ball_of_its_factor(name):
    text = Rule(scale=Scale(name)).describe(weight_decay=0.5, fan_out=12, fan_in=3)
    assert text.startswith("min F subject to spectral norm <= ")
    assert float(text.rsplit(" ", 1)[1]) == pytest.approx(TABLE[12, 3][name] / 0.5, rel=1e-3)  # four digits
