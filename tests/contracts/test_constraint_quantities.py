"""Quantities of constraint, stationarity and V_K read off a rule what its decay implies, and log nothing where it does not."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import schatten
from schatten import maps, signals, solvers
from schatten.diagnostics.constraint import Constraint, ball_violation, constraint_ratio, steps_to_enter
from schatten.diagnostics.core import Block, Quantity, Whole
from schatten.diagnostics.lyapunov import Lyapunov, lyapunov
from schatten.diagnostics.stationarity import Stationarity, kkt_residual
from schatten.monitor import Alarm, Monitor
from schatten.retractions import CautiousDecay, DecoupledDecay, FixedNorm
from schatten.scales import RMS, Scale
from tests.contracts.matrices import with_spectrum

SVD = solvers.svd()

QUANTITIES = (Constraint(), Stationarity(), Lyapunov())

GROUP = {"lr": 0.02, "weight_decay": 0.5, "momentum": 0.9, "betas": (0.8, 0.95)}


def block(rule, scale=1.0, dtype=torch.float32, group=(), **given):
    generator = torch.Generator().manual_seed(0)
    # A gap behind the largest singular value, so that power iteration has converged.
    W = torch.stack([scale * with_spectrum(6, 4, torch.tensor([9.0, 3.0, 2.0, 1.0]), seed=seed) for seed in (0, 2)]).to(dtype)
    G, M = torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64).to(dtype)
    return Block("W", rule, {**GROUP, **dict(group)}, W, **{"gradient": G, "momentum": M, **given})


def whole(of, losses=(lambda: torch.tensor(2.0), lambda: torch.tensor(4.0))):
    return Whole({"W": nn.Parameter(of.weight)}, [of], losses)


def called(quantity, of):
    return quantity(whole(of) if quantity.scope == "model" else of)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_quantity_returns_its_columns_one_number_for_each_block_and_changes_nothing(quantity, dtype):
    assert isinstance(quantity, Quantity)
    of = block(schatten.Rule(), dtype=dtype)
    before = copy.deepcopy((of.weight, of.gradient, of.momentum))
    state = torch.get_rng_state()
    found = called(quantity, of)
    assert set(found) <= set(quantity.columns) and len(found) >= 3
    for value in found.values():
        assert value.shape == (() if quantity.scope == "model" else (2,)) and value.dtype in (torch.float32, torch.float64)
        assert value.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, (of.weight, of.gradient, of.momentum), strict=True))
    assert torch.equal(state, torch.get_rng_state())


NO_PROBLEM = {
    "cautious decay": schatten.Rule(retraction=CautiousDecay()),
    "fixed norm": schatten.Rule(retraction=FixedNorm()),
    "relative threshold": schatten.Rule(map=maps.Huber(0.3, relative="frobenius")),
    "measured scale of another direction": schatten.Rule(map=maps.Power(0.5), scale=RMS()),
}


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
@pytest.mark.parametrize("name", NO_PROBLEM)
def test_rules_whose_decay_implies_no_problem_log_nothing(name, quantity):
    assert called(quantity, block(NO_PROBLEM[name])) == {}


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
def test_directions_that_are_no_gradient_log_nothing(quantity):
    for preset in (schatten.NorMuon, schatten.Dion2, schatten.MuonEq):
        opt = preset([nn.Parameter(torch.zeros(6, 4))])
        assert called(quantity, block(opt.rule(opt.param_groups[0]))) == {}, preset


def test_muons_map_on_another_signal_has_its_ball_but_no_stationarity():
    opt = schatten.SOAPMuon([nn.Parameter(torch.zeros(6, 4))])
    of = block(opt.rule(opt.param_groups[0]))
    assert {q.name for q in QUANTITIES if called(q, of)} == {"constraint"}


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("scale", ["adamw-rms", "keller", "none"])
def test_the_constraint_is_that_of_the_functions_with_the_rules_factor(scale, decay):
    rule = schatten.Rule(scale=Scale(scale), retraction=DecoupledDecay(decay))
    of = block(rule)
    found, c = Constraint()(of), Scale(scale).factor(6, 4)
    torch.testing.assert_close(found["ratio"].double(), constraint_ratio(of.weight, 0.5, c), rtol=1e-5, atol=0)
    torch.testing.assert_close(found["excess"].double(), ball_violation(of.weight, 0.5, c), rtol=1e-5, atol=0)
    assert found["radius"].tolist() == pytest.approx([c / 0.5] * 2)
    assert found["steps"].tolist() == [steps_to_enter(9.0, 0.02, 0.5, c, decay=decay)] * 2


def test_steps_are_none_inside_and_infinitely_many_without_a_rate():
    rule = schatten.Rule(scale=Scale("none"))
    assert Constraint()(block(rule, scale=0.1))["steps"].tolist() == [0, 0]
    assert Constraint()(block(rule, group={"lr": 0.0}))["steps"].tolist() == [math.inf] * 2
    assert Constraint()(block(rule, group={"lr": torch.tensor(0.02)}))["steps"].tolist() == [steps_to_enter(9.0, 0.02, 0.5)] * 2
    assert Constraint()(block(rule, group={"lr": 2.0}))["steps"].tolist() == [1, 1]


def test_the_constraint_is_specific_to_the_map():
    def found(K, **options):
        return Constraint()(block(schatten.Rule(map=K, scale=Scale("none")), **options))

    assert found(maps.Clip(0.5))["radius"].tolist() == [1.0, 1.0]
    assert found(2.0 * maps.Nuclear())["radius"].tolist() == [4.0, 4.0]
    assert found(0.5 * maps.Nuclear() + 0.5 * maps.Frobenius())["radius"].tolist() == [2.0, 2.0]
    assert set(found(maps.L1())) == {"violation"}
    W = block(schatten.Rule()).weight
    torch.testing.assert_close(found(maps.L1())["violation"].float(), W.abs().amax((-2, -1)) * 0.5 - 1)
    # No ball: a regulariser, a sum that is no function of singular values, no decay.
    assert (
        found(maps.Power(0.5)) == found(maps.Nuclear() + maps.L1()) == found(maps.Nuclear(), group={"weight_decay": 0.0}) == {}
    )


def test_stationarity_is_the_kkt_residual_also_relative_and_over_lambda():
    for rule in (schatten.Rule(), schatten.Rule(map=maps.Huber(0.3), scale=Scale("keller"))):
        of = block(rule, scale=0.1)
        found = Stationarity(solver=None)(of)
        c = rule.scale.factor(6, 4)
        residual, violation = kkt_residual(rule.map, of.weight, of.gradient, 0.5, c)
        size = c * rule.map.value(of.gradient)
        expected = {"residual": residual, "relative": residual / size, "violation": violation, "gap": residual / 0.5}
        torch.testing.assert_close(dict(found), expected)
    # Of the default by one polar factor.
    cheap, exact = Stationarity()(block(schatten.Rule())), Stationarity(solver=None)(block(schatten.Rule()))
    torch.testing.assert_close(dict(cheap), dict(exact), rtol=1e-4, atol=1e-4)


def test_the_relative_residual_is_within_zero_and_two_in_the_ball():
    rule = schatten.Rule(scale=Scale("none"))
    W = 2.0 * torch.eye(6, 4)[None]
    assert Stationarity()(block(rule, gradient=W))["relative"].shape == (2,)
    for G, relative in ((W, 2.0), (-W, 0.0)):
        found = Stationarity(solver=None)(Block("W", rule, GROUP, W, gradient=G))
        assert found["relative"].tolist() == [relative]


def test_without_decay_stationarity_has_no_gap():
    assert set(Stationarity()(block(schatten.Rule(), group={"weight_decay": 0.0}))) == {"residual", "relative"}


def test_signals_that_are_no_average_of_gradients_and_maximising_have_no_stationarity():
    assert Stationarity()(block(schatten.Rule(signal=signals.AdamRatio()))) == {}
    assert Stationarity()(block(schatten.Rule(), group={"maximize": True})) == {}
    assert Lyapunov()(whole(block(schatten.Rule(signal=signals.AdamRatio())))) == {}
    assert Lyapunov()(whole(block(schatten.Rule(), group={"maximize": True}))) == {}


@pytest.mark.parametrize("quantity", [Stationarity(), Lyapunov()], ids=lambda q: q.name)
def test_a_sum_of_gradients_is_an_average_under_another_threshold(quantity):
    """K(S) = Huber_a on S / (1 - mu) is Huber_(a (1 - mu)) / (1 - mu) on S."""
    mu, a = 0.9, 3.0
    of = block(schatten.Rule(signals.Momentum("ema"), maps.Huber(a * (1 - mu), solver=SVD)), scale=0.1, dtype=torch.float64)
    summed = block(
        schatten.Rule(signals.Momentum("sum"), maps.Huber(a, solver=SVD)),
        scale=0.1,
        dtype=torch.float64,
        momentum=of.momentum / (1 - mu),
    )
    torch.testing.assert_close(dict(called(quantity, of)), dict(called(quantity, summed)))


def test_v_k_of_a_model_is_the_mean_loss_and_what_each_matrix_adds():
    rule = schatten.Rule(scale=Scale("keller"), retraction=DecoupledDecay("implicit"))
    of = block(rule, scale=0.1)
    found = Lyapunov(minimum=1.0, solver=None)(whole(of))
    betas, c = (0.9**2, 0.9), Scale("keller").factor(6, 4)
    beyond = lyapunov(rule.map, of.weight, of.momentum, 0.0, 0.02, 0.5, betas, c).sum()
    torch.testing.assert_close(dict(found), {"value": 2.0 + beyond, "loss": torch.tensor(3.0).double(), "beyond": beyond})


def test_v_k_is_only_logged_where_it_must_fall():
    assert Lyapunov()(whole(block(schatten.Rule(signal=signals.TwoBeta()), group={"betas": (0.95, 0.9)}))) == {}
    assert Lyapunov()(whole(block(schatten.Rule(), momentum=None))) == {}
    assert Lyapunov()(whole(block(schatten.Rule()), losses=())) == {}
    assert Lyapunov()(whole(block(schatten.Rule(signal=signals.Gradient()), momentum=None)))["beyond"] == 0


def test_an_alarm_is_raised_where_the_excess_grows_and_only_there():
    alarm = Constraint().alarm

    def record(ratio, radius=2.0):
        return {"ratio": ratio, "excess": max(ratio - 1, 0) * radius, "radius": radius, "steps": 1.0}

    assert alarm(record(3.0), record(3.1)) is not None
    assert alarm(record(0.9), record(1.3)) is not None
    for before, now in (
        (record(3.0), record(2.9)),  # shrinking
        (record(3.0), record(3.0005)),  # within what power iteration and rounding do
        (record(0.5), record(0.9)),  # inside
        (record(0.9), record(1.15)),  # within a solver's overshoot
        (record(1.0, radius=4.0), record(2.0, radius=2.0)),  # lambda has doubled
        ({}, record(3.0)),
    ):
        assert alarm(before, now) is None, (before, now)
    assert Constraint(overshoot=0.01).alarm(record(0.9), record(1.15)) is not None
    assert alarm({"violation": 1.0}, {"violation": 1.5}) is not None
    assert alarm({"violation": 1.5}, {"violation": 1.0}) is None
    message = alarm(record(3.0), record(3.1))
    for cause in ("shape factor", "Newton-Schulz overshoot", "lr * weight_decay", "2"):
        assert cause in message


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda q: q.name)
def test_no_value_is_read_from_the_device(quantity):
    of = block(schatten.Rule())
    if quantity.name != "constraint":
        # Solvers look at values where that is free, on the CPU.
        quantity = type(quantity)(solver=lambda S: S)
    with Unread():
        assert called(quantity, of)
    with pytest.raises(AssertionError, match="waits"), Unread():
        bool(of.weight.sum() > 0)


class Unread(TorchDispatchMode):
    """Refuses to read a value of a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "this waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_monitor_warns_of_a_weight_that_something_else_moves_out_of_its_ball_and_not_of_one_that_enters():
    def trained(growth):
        p = nn.Parameter(8 * torch.eye(6, 4))
        opt = schatten.Muon([p], lr=0.05, weight_decay=0.5, scale="none")
        with Monitor(opt, every=5, quantities=["constraint"]) as monitor:
            for _ in range(20):
                p.grad = torch.randn(6, 4)
                opt.step()
                p.data.mul_(growth)
        return [record["constraint/excess"] for record in monitor.records]

    with pytest.warns(Alarm, match="V_B grew"):
        trained(1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < trained(1.0)[0] < 6
