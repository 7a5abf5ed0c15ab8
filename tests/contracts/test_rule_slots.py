"""A rule refuses what does not fill its slot, at construction."""

import pytest

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


@pytest.mark.parametrize("K", [maps.Huber(0.1), maps.KyFan(2), 0.5 * maps.Nuclear() + maps.L1()], ids=repr)
def test_any_map_fills_it_and_is_part_of_the_rules_text(K):
    rule = schatten.Rule(map=K)
    assert repr(K) in repr(rule) and rule != schatten.Rule()
    assert rule.describe(0.5, 4, 4) == K.describe(0.5, rule.scale.factor(4, 4))
