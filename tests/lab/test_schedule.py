"""The learning rate as a share of its peak: warm-up, decay, and what both end at."""

import itertools
import math

import pytest

from schatten.lab.schedule import COOLDOWN, SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_factors_lie_between_zero_and_one_and_fall_after_the_warm_up(schedule, steps, warmup, final):
    factors = [lr_factor(schedule, step, steps, warmup=warmup, final=final) for step in range(steps)]
    # No step is taken at a factor of zero, which would be a step for nothing.
    assert all(0 < f <= 1 for f in factors)
    assert all(a >= b for a, b in itertools.pairwise(factors[warmup:]))
    assert all(a < b for a, b in itertools.pairwise(factors[:warmup]))


def test_warm_up_is_linear_up_to_the_peak():
    assert [lr_factor("cosine", step, 10, warmup=4) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_each_schedule_is_its_formula():
    cosine = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert [lr_factor("cosine", t + 2, 10, warmup=2, final=0.2) for t in range(8)] == pytest.approx(cosine)
    linear = [min(1.0, (1 - t / 10) / COOLDOWN) for t in range(10)]
    assert [lr_factor("linear", t, 10) for t in range(10)] == pytest.approx(linear)
    assert linear[:6] == [1.0] * 6 and linear[-1] == pytest.approx(0.25)
    assert [lr_factor("constant", t, 10, final=0.5) for t in range(10)] == [1.0] * 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_end_is_the_final_share(schedule):
    expected = 1.0 if schedule == "constant" else 0.3
    assert lr_factor(schedule, 100, 100, warmup=5, final=0.3) == pytest.approx(expected)
