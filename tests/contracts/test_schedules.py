"""PowerCool, MomentumSchedule and Lion's rate: every step's value, which groups they reach, resuming, wrong input."""

import copy
import io
import itertools
import math
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import schatten
from schatten.schedules import MomentumSchedule, PowerCool, lion_rate

STEPS = 24


def sgd(lr=0.3):
    return torch.optim.SGD([nn.Parameter(torch.ones(4, 3))], lr=lr, momentum=0.5)


def muon(lr=0.3):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return schatten.Muon(model, lr=lr)


OPTIMIZERS = {"SGD": sgd, "Muon": muon}


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def series(opt, *steppers, steps=STEPS, key="lr"):
    """`key` of every group at every step of a run, None for a group without it."""
    seen = []
    for _ in range(steps):
        seen.append([group.get(key) for group in opt.param_groups])
        opt.step()
        for stepper in steppers:
            stepper.step()
    return seen


def saved(thing):
    """A state_dict after a round through a file that may hold plain values and tensors only."""
    buffer = io.BytesIO()
    torch.save(thing.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- PowerCool ------------------------------------------------------------------------------------------------------------


def power_cool(t, *, lr, end, exponent, cooldown, warmup, floor):
    """The docstring's formula, in the words min(lr_0, c (end - t)^exponent)."""
    c = lr / (cooldown * end) ** exponent
    value = max(floor * lr, c * max(0, end - t) ** exponent)
    return min(lr, value, lr * (t + 1) / warmup if warmup else lr)


@pytest.mark.parametrize("exponent", [0.5, 1, 1.2, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        {"end": 24, "cooldown": 0.7, "warmup": 0, "floor": 0.0},
        {"end": 24, "cooldown": 1.0, "warmup": 5, "floor": 0.1},
        {"end": 30.5, "cooldown": 0.4, "warmup": 3, "floor": 0.0},
        {"end": 10, "cooldown": 0.5, "warmup": 0, "floor": 0.0},
        {"end": 10, "cooldown": 0.5, "warmup": 9, "floor": 0.25},
    ],
    ids=["plain", "all cool-down", "end behind the run", "end within the run", "ramps overlap"],
)
def test_power_cool_equals_its_formula_at_every_step(make, exponent, options):
    opt = make()
    seen = series(opt, PowerCool(opt, exponent=exponent, **options))
    expected = [power_cool(t, lr=0.3, exponent=exponent, **options) for t in range(STEPS)]
    for step, lr in zip(seen, expected, strict=True):
        # fp64 on both sides, a power each; 1e-16 absolute for the zeros.
        assert step == pytest.approx([lr] * len(step), rel=1e-13, abs=1e-16)


def test_power_cool_splits_the_cool_down_by_algorithm():
    opt = muon()
    seen = series(opt, PowerCool(opt, end=20, cooldown={"adamw": 0.4, "spectral": 0.8}))
    for group, fraction in enumerate([0.8, 0.4]):
        assert opt.param_groups[group]["algorithm"] == ["spectral", "adamw"][group]
        options = {"lr": 0.3, "end": 20, "exponent": 1.2, "cooldown": fraction, "warmup": 0, "floor": 0.0}
        expected = [power_cool(t, **options) for t in range(STEPS)]
        assert [step[group] for step in seen] == pytest.approx(expected, rel=1e-13, abs=1e-16)


def test_power_cool_scales_each_group_s_own_lr():
    opt = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1.0, 8.0)])
    assert all(8 * low == high for low, high in series(opt, PowerCool(opt, end=16)))


def test_power_cool_moves_a_tensor_lr_in_place():
    lr = torch.tensor(0.3, dtype=torch.float64)
    opt, twin = sgd(lr), sgd()
    scheduler, expected = PowerCool(opt, end=20), series(twin, PowerCool(twin, end=20))
    for (number,) in expected:
        assert opt.param_groups[0]["lr"] is lr
        assert lr.item() == pytest.approx(number, rel=1e-13, abs=1e-16)
        opt.step()
        scheduler.step()


def test_power_cool_may_follow_another_scheduler():
    opt, twin = sgd(), sgd()
    constant = schedulers.ConstantLR(opt, factor=0.5, total_iters=100)
    both = schedulers.SequentialLR(opt, [constant, PowerCool(opt, end=16)], milestones=[8])
    assert series(opt, both) == [[0.15]] * 8 + series(twin, PowerCool(twin, end=16), steps=STEPS - 8)


def test_a_steep_short_cool_down_does_not_overflow_on_the_plateau():
    opt = sgd(1.0)
    assert series(opt, PowerCool(opt, end=1000, exponent=200, cooldown=1e-3)) == [[1.0]] * STEPS


@pytest.mark.parametrize("at", [0, 1, 9, 20])
def test_a_power_cool_run_resumes_exactly(make, at):
    opt = make()
    scheduler = PowerCool(opt, end=20, warmup=4)
    series(opt, scheduler, steps=at)
    states = saved(opt), saved(scheduler)
    expected = series(opt, scheduler)
    other = make()
    resumed = PowerCool(other, end=20, warmup=4)
    for thing, state in zip((other, resumed), states, strict=True):
        thing.load_state_dict(state)
    assert series(other, resumed) == expected
    assert resumed.get_last_lr() == scheduler.get_last_lr()


def test_a_split_cool_down_is_saved_as_plain_values():
    opt = muon()
    mapping = types.MappingProxyType({"spectral": 0.8, "adamw": 0.4})
    scheduler = PowerCool(opt, end=20, cooldown=mapping)
    assert saved(scheduler)["cooldown"] == {"spectral": 0.8, "adamw": 0.4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 0}, "end must be a positive"),
        ({"end": math.inf}, "end must be a positive"),
        ({"end": math.nan}, "end must be a positive"),
        ({"exponent": 0}, "exponent must be positive"),
        ({"exponent": math.nan}, "exponent must be positive"),
        ({"cooldown": 0}, r"cooldown must lie in \(0, 1\]"),
        ({"cooldown": 1.1}, r"cooldown must lie in \(0, 1\]"),
        ({"cooldown": {"spectral": 0.8, "adamw": 0}}, "got 0 for adamw"),
        ({"cooldown": {"spectral": 0.8, "adamw": 0.4, "lion": 0.4}}, "the key 'lion'"),
        ({"cooldown": {"spectral": 0.8}}, "'adamw' of group 1"),
        ({"warmup": -1}, "warmup must be a whole number"),
        ({"warmup": 2.5}, "warmup must be a whole number"),
        ({"warmup": 20}, "warmup must be a whole number"),
        ({"floor": 1.0}, "floor must lie in"),
        ({"floor": -0.1}, "floor must lie in"),
    ],
)
def test_power_cool_refuses_wrong_numbers_and_touches_nothing(options, message):
    opt = muon()
    before = [dict(group) for group in opt.param_groups]
    with pytest.raises(ValueError, match=message):
        PowerCool(opt, **{"end": 20, **options})
    assert opt.param_groups == before


def test_power_cool_refuses_a_split_for_groups_without_an_algorithm():
    with pytest.raises(ValueError, match="group 0 has no key 'algorithm'"):
        PowerCool(sgd(), end=20, cooldown={"spectral": 0.8, "adamw": 0.4})


def test_power_cool_refuses_what_is_no_optimizer():
    with pytest.raises(TypeError, match="not an Optimizer"):
        PowerCool(nn.Linear(2, 2), end=20)


# -- MomentumSchedule -----------------------------------------------------------------------------------------------------


def momentum(t, *, steps, start, peak, end, warmup, cooldown):
    """The curve as interpolation between its corners."""
    corners = [(0, start if warmup else peak), (warmup, peak), (steps - cooldown, peak), (steps, end if cooldown else peak)]
    for (a, low), (b, high) in itertools.pairwise(corners):
        if a <= t <= b and a < b:
            return low + (high - low) * (t - a) / (b - a)
    return corners[-1][1]


@pytest.mark.parametrize(
    "ramps", [(6, 5), (0, 5), (6, 0), (0, 0), (10, 10)], ids=["both", "no warm-up", "no cool-down", "none", "no plateau"]
)
def test_momentum_equals_its_formula_at_every_step(make, ramps):
    opt, (warmup, cooldown) = make(), ramps
    options = {"steps": 20, "start": 0.8, "peak": 0.95, "end": 0.9, "warmup": warmup, "cooldown": cooldown}
    seen = series(opt, MomentumSchedule(opt, **options), key="momentum")
    # The two sides interpolate in other orders, by some ulps of fp64.
    assert [step[0] for step in seen] == pytest.approx([momentum(t, **options) for t in range(STEPS)], rel=1e-14)


def test_momentum_leaves_adamw_groups_and_every_lr_alone():
    opt = muon()
    opt.param_groups[1]["momentum"] = 0.7  # as OneCycleLR leaves it there
    lrs = [group["lr"] for group in opt.param_groups]
    seen = series(opt, MomentumSchedule(opt, steps=20, warmup=5, cooldown=5), key="momentum")
    assert len({spectral for spectral, _ in seen}) > 5 and {adamw for _, adamw in seen} == {0.7}
    assert [group["lr"] for group in opt.param_groups] == lrs
    assert not any("initial_lr" in group for group in opt.param_groups)


LR_SCHEDULERS = {
    "PowerCool": lambda opt: PowerCool(opt, end=20),
    "StepLR": lambda opt: schedulers.StepLR(opt, 3),
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, T_max=20),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, max_lr=0.3, total_steps=STEPS + 1, cycle_momentum=False),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
@pytest.mark.parametrize("first", ["lr", "momentum"])
def test_momentum_and_any_lr_scheduler_do_not_disturb_each_other(make, name, first):
    alone = make()
    lrs = series(alone, LR_SCHEDULERS[name](alone))
    alone = make()
    betas = series(alone, MomentumSchedule(alone, steps=20, warmup=5, cooldown=5), key="momentum")
    opt = make()
    makers = {"lr": LR_SCHEDULERS[name], "momentum": lambda o: MomentumSchedule(o, steps=20, warmup=5, cooldown=5)}
    steppers = [makers[key](opt) for key in sorted(makers, key=lambda key: key != first)]
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's warning about the order of calls would be one
        for _ in range(STEPS):
            seen.append([(group["lr"], group.get("momentum")) for group in opt.param_groups])
            opt.step()
            for stepper in steppers:
                stepper.step()
    assert [[lr for lr, _ in step] for step in seen] == lrs
    assert [[beta for _, beta in step] for step in seen] == betas


@pytest.mark.parametrize("at", [0, 3, 12, 18])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_a_momentum_run_resumes_exactly_in_either_order_of_loading(make, at, optimizer_first):
    opt = make()
    schedule = MomentumSchedule(opt, steps=20, warmup=5, cooldown=5)
    series(opt, schedule, steps=at)
    opt_state, state = saved(opt), saved(schedule)
    expected = series(opt, schedule, key="momentum")
    other = make()
    if optimizer_first:
        other.load_state_dict(opt_state)
    resumed = MomentumSchedule(other, steps=20, warmup=5, cooldown=5)
    resumed.load_state_dict(state)
    if not optimizer_first:
        other.load_state_dict(opt_state)
    assert series(other, resumed, key="momentum") == expected
    assert resumed.state_dict() == schedule.state_dict()


def test_momentum_refuses_an_optimizer_that_has_none():
    p = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="No group of AdamW has a momentum"):
        MomentumSchedule(torch.optim.AdamW([p]), steps=500)
    only_adamw = schatten.Muon([{"params": [p], "algorithm": "adamw", "momentum": 0.9}])
    with pytest.raises(ValueError, match="No group of Muon has a momentum"):
        MomentumSchedule(only_adamw, steps=500)
    with pytest.raises(TypeError, match="got Linear"):
        MomentumSchedule(nn.Linear(2, 2), steps=500)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0}, r"start must lie in \[0, 1\)"),
        ({"peak": -0.1}, r"peak must lie in \[0, 1\)"),
        ({"end": math.nan}, r"end must lie in \[0, 1\)"),
        ({"steps": 449}, "warmup=300 and cooldown=150 overlap in steps=449"),
        ({"steps": 1000.0}, "steps must be a whole number"),
        ({"warmup": -1}, "warmup must be a whole number"),
        ({"cooldown": 1.5}, "cooldown must be a whole number"),
    ],
)
def test_momentum_refuses_wrong_numbers_and_touches_nothing(options, message):
    opt = sgd()
    with pytest.raises(ValueError, match=message):
        MomentumSchedule(opt, **{"steps": 1000, **options})
    assert opt.param_groups[0]["momentum"] == 0.5


def test_momentum_refuses_another_schedule_s_state():
    opt = sgd()
    schedule = MomentumSchedule(opt, steps=1000)
    before = copy.copy(schedule.state_dict())
    with pytest.raises(ValueError, match="not a MomentumSchedule's state"):
        schedule.load_state_dict(PowerCool(opt, end=1000).state_dict())
    assert schedule.state_dict() == before


# -- Lion's rate ----------------------------------------------------------------------------------------------------------


def test_lion_rate_equals_its_formula():
    lr, (beta1, beta2) = lion_rate(256, 100, c1=2.0, c2=0.5, c3=3.0)
    # 256 = 2^8: every power of it is exact, and sqrt(100) is too.
    assert (lr, beta1, beta2) == (3 / (10 * 64), 1 - 2 / 16, 1 - 0.5 / 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"steps": 2.5}, "steps must be a whole number >= 1"),
        ({"dimension": 0}, "dimension must be a whole number >= 1"),
        ({"c1": 0.0}, "c1 must be positive"),
        ({"c2": 10.5}, r"c2 must be positive and at most sqrt\(steps\) = 10, got 10.5"),
        ({"c1": math.nan}, "c1 must be positive"),
        ({"c3": 0.0}, "c3 must be positive"),
        ({"c3": math.inf}, "c3 must be positive"),
    ],
)
def test_lion_rate_refuses_values_outside_its_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        lion_rate(**{"steps": 100, "dimension": 10, **arguments})


def test_lion_rate_is_accepted_at_the_edge_of_its_range():
    assert lion_rate(100, 10, c1=10.0)[1][0] == 0.0
