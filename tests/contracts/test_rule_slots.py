"""A rule refuses what does not fill its slot, at construction."""

import pytest
import torch

import schatten
from schatten import maps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"map": maps.Nuclear}, r"map must be a map of schatten.maps, got the class Nuclear: write Nuclear\(...\)"),
        ({"map": "nuclear"}, "map must be a map of schatten.maps, got 'nuclear'"),
        ({"scale": "keller"}, "scale must be a scale of schatten.scales, got 'keller'"),
        ({"signal": schatten.signals.Momentum}, "signal must be a signal of schatten.signals, got the class Momentum"),
        ({"retraction": None}, "retraction must be a retraction of schatten.retractions, got None"),
    ],
)
def test_what_fills_no_slot_is_refused(options, text):
    with pytest.raises(TypeError, match=text):
        schatten.Rule(**options)


def test_a_measured_scale_says_for_what_length_its_problem_is():
    rule = schatten.Rule(map=maps.Power(0.5), scale=schatten.scales.RMS())
    assert rule.describe(0.5, 4, 4).endswith("for D as long as U V^T")
    assert rule.describe(0.0, 4, 4) == maps.Power(0.5).describe(0.0)


def test_two_slots_that_keep_state_under_one_name_are_refused():
    rule = schatten.Rule(schatten.signals.Momentum(), schatten.presets.dion2.HeaviestSlices())
    with pytest.raises(ValueError, match=r"keep state under one name, \['momentum_buffer'\]"):
        schatten.SpectralOptimizer([torch.nn.Parameter(torch.zeros(4, 3))], rule, momentum=0.9)


def test_a_direction_fills_the_maps_place():
    rule = schatten.Rule(map=schatten.powers.NegativePower(-0.5))
    assert rule.describe(0.5, 4, 4) == "min F with decay; no convex K, so no problem is implied"
    assert rule.hyperparameters == ("momentum",)


@pytest.mark.parametrize("K", [maps.Huber(0.1), maps.KyFan(2), 0.5 * maps.Nuclear() + maps.L1()], ids=repr)
def test_any_map_fills_it_and_is_part_of_the_rules_text(K):
    rule = schatten.Rule(map=K)
    assert repr(K) in repr(rule) and rule != schatten.Rule()
    assert rule.describe(0.5, 4, 4) == K.describe(0.5, rule.scale.factor(4, 4))
