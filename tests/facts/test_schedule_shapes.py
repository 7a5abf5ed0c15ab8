"""The schedules of the literature: PowerCool and momentum of modded-nanogpt's track 3, the linear ramp, Lion's rate."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from schatten.schedules import MomentumSchedule, PowerCool, lion_rate


def optimizer(lr=1.0):
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=lr, momentum=0.9)


def series(make_scheduler, steps):
    opt = optimizer()
    scheduler, seen = make_scheduler(opt), []
    for _ in range(steps):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return seen


def test_exponent_one_is_torch_s_linear_ramp():
    ours = series(lambda opt: PowerCool(opt, end=50, exponent=1, cooldown=1.0), 60)
    theirs = series(lambda opt: schedulers.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=50), 60)
    # torch multiplies 50 factors of rounding error 1e-16 each; near zero they are differences of numbers near one.
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-14)


def test_exponent_one_is_the_trapezoid_of_warm_up_plateau_and_linear_cool_down():
    def trapezoid(t):
        return (t + 1) / 5 if t < 5 else 1.0 if t < 30 else (100 - t) / 70

    ours = series(lambda opt: PowerCool(opt, end=100, exponent=1, cooldown=0.7, warmup=5), 100)
    assert ours == pytest.approx(series(lambda opt: schedulers.LambdaLR(opt, trapezoid), 100), rel=1e-13)


@pytest.mark.parametrize("exponent", [1.0, 1.2, 2.0])
def test_the_branches_meet_where_the_cool_down_begins(exponent):
    lrs = series(lambda opt: PowerCool(opt, end=1000, exponent=exponent, cooldown=0.4), 1000)
    assert lrs[:601] == [1.0] * 601
    # The first step of the cool-down loses exponent / 400 to first order, the second order adding less than a third of 1 %.
    assert 1 - lrs[601] == pytest.approx(exponent / 400, rel=3e-3)


def test_a_run_that_stops_before_the_end_stops_at_the_published_learning_rate():
    # Notes on a 2900-step run of track 3 (end 2985, exponent 1.2) give its last lr as 0.00069, 1.8 % of the full one. The
    # matrices' lr 0.0375 and fraction 0.8 of that track's records yield both.
    opt = optimizer(lr=0.0375)
    scheduler = PowerCool(opt, end=2985, exponent=1.2, cooldown=0.8)
    for _ in range(2900):
        opt.step()
        scheduler.step()
    lr = opt.param_groups[0]["lr"]
    assert round(lr, 5) == 0.00069 and round(lr / 0.0375, 3) == 0.018


def test_the_larger_exponent_cools_earlier_and_ends_flatter():
    linear = series(lambda opt: PowerCool(opt, end=100, exponent=1, cooldown=1.0), 100)
    power = series(lambda opt: PowerCool(opt, end=100, exponent=1.2, cooldown=1.0), 100)
    assert all(p < q for p, q in zip(power[1:], linear[1:], strict=True))
    drops = [a - b for a, b in itertools.pairwise(power)]
    assert all(early > late for early, late in itertools.pairwise(drops))


def test_momentum_has_the_corners_of_the_published_schedule():
    # Track 3's mu: 0.85 to 0.95 over 300 steps, back over the last 150 of a run.
    schedule = MomentumSchedule(optimizer(), steps=2900)
    corners = {0: 0.85, 150: 0.9, 300: 0.95, 1600: 0.95, 2750: 0.95, 2825: 0.9, 2900: 0.85, 4000: 0.85}
    assert {t: schedule.momentum_at(t) for t in corners} == pytest.approx(corners, rel=1e-14)


def test_lion_s_rate_moves_by_its_powers_of_steps_and_dimension():
    lr, betas = lion_rate(10**4, 10**6)
    longer, longer_betas = lion_rate(16 * 10**4, 10**6)
    wider, wider_betas = lion_rate(10**4, 4 * 10**6)
    assert longer == pytest.approx(lr / 8, rel=1e-14)
    assert [1 - beta for beta in longer_betas] == pytest.approx([(1 - beta) / 4 for beta in betas], rel=1e-12)
    assert wider == pytest.approx(lr / 2, rel=1e-14) and wider_betas == betas
