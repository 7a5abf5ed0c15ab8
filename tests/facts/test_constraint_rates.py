"""The excess over c / lambda shrinks by 1 - lr lambda (explicit decay), 1 / (1 + lr lambda) (implicit), for any gradient."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten import maps
from schatten.diagnostics.constraint import (
    ball_violation,
    constraint_ratio,
    decay_for_radius,
    direction_bound,
    radius_of_decay,
    steps_to_enter,
)
from tests.contracts.map_laws import instances, lift_of
from tests.facts.constraint_runs import DECAY, FACTOR, GRADIENTS, LRS, SHAPE, START, kept, run

# What fp64 leaves of 200 steps.
PRECISION = 1e-10

SVD = schatten.solvers.svd()

F64 = torch.float64


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("lrs", LRS)
@pytest.mark.parametrize("gradients", GRADIENTS)
def test_no_gradient_makes_the_excess_shrink_more_slowly(gradients, lrs, decay):
    violations = run(gradients, lrs, decay)
    assert violations[0] > 0
    for before, after, lr in zip(violations[:-1], violations[1:], LRS[lrs](), strict=True):
        assert after <= kept(lr, decay) * before + PRECISION


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("lrs", LRS)
def test_gradients_that_push_outward_shrink_it_at_exactly_the_rate(lrs, decay):
    violations, expected = run("outward", lrs, decay), START - FACTOR / DECAY
    for violation, lr in zip(violations, [*LRS[lrs](), 0.0], strict=True):
        assert violation == pytest.approx(expected, abs=PRECISION)
        expected *= kept(lr, decay)


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
def test_zero_gradients_take_the_radius_out_of_it_as_well(decay):
    for t, violation in enumerate(run("zero", "constant", decay)):
        left = kept(LRS["constant"]()[0], decay) ** t
        assert violation == pytest.approx(max(START * left - FACTOR / DECAY, 0), abs=PRECISION)


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("lrs", LRS)
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_the_predicted_number_of_steps_is_the_one_that_outward_gradients_take(lrs, decay, margin):
    violations, rates = run("outward", lrs, decay), LRS[lrs]()
    steps = steps_to_enter(START, rates, DECAY, FACTOR, margin=margin, decay=decay)
    assert steps is not None and 0 < steps < len(violations)
    radius = FACTOR / DECAY
    assert violations[steps] <= margin * radius + PRECISION < violations[steps - 1]
    assert steps_to_enter(START, lambda t: rates[t], DECAY, FACTOR, margin=margin, decay=decay) == steps
    if lrs == "constant":
        assert steps_to_enter(START, rates[0], DECAY, FACTOR, margin=margin, decay=decay) == steps


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_other_gradients_take_no_more(gradients):
    violations = run(gradients, "constant", "explicit")
    steps = steps_to_enter(START, LRS["constant"]()[0], DECAY, FACTOR, margin=0.5)
    assert steps is not None and violations[steps] <= 0.5 * FACTOR / DECAY + PRECISION


def test_the_number_of_steps_is_a_statement_about_the_sum_of_lr_lambda():
    # exp(-lambda sum lr) is the limit of either product for small steps.
    predicted = math.log((5 - 2) / (0.01 * 2)) / (0.5 * 1e-4)
    for decay in ("explicit", "implicit"):
        assert steps_to_enter(5.0, 1e-4, 0.5, decay=decay) == pytest.approx(predicted, rel=1e-4)
    assert steps_to_enter(5.0, 1e-4, 0.5, decay="explicit") <= steps_to_enter(5.0, 1e-4, 0.5, decay="implicit")


def test_steps_to_enter_at_the_ends():
    assert steps_to_enter(2.0, 0.1, 0.5) == 0  # on the boundary
    assert steps_to_enter(9.0, 0.1, 0.0) == 0  # no ball
    assert steps_to_enter(9.0, 0.0, 0.5) is None
    assert steps_to_enter(9.0, [0.1] * 3, 0.5) is None
    assert steps_to_enter(9.0, lambda t: 0.5**t, 0.5, limit=1000) is None
    assert steps_to_enter(9.0, 2.0, 0.5) == 1  # explicit decay of lr lambda = 1 takes all of it
    assert steps_to_enter(1e300, 0.1, 0.5) is not None
    for options in ({"lr": 3.0}, {"lr": [3.0]}, {"lr": -1.0}, {"lr": 0.1, "decay": "cautious"}, {"lr": 0.1, "margin": 0.0}):
        with pytest.raises(ValueError, match=r"lr \* weight_decay|decay must|margin must"):
            steps_to_enter(9.0, weight_decay=0.5, **options)


def test_ratio_violation_and_radius_are_one_statement():
    W = torch.randn(4, 5, 3, dtype=F64) * torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64).view(4, 1, 1)
    ratio, violation, radius = constraint_ratio(W, 0.7, 1.3), ball_violation(W, 0.7, 1.3), radius_of_decay(0.7, 1.3)
    norms = torch.linalg.matrix_norm(W, ord=2)
    torch.testing.assert_close(ratio, norms / radius)
    torch.testing.assert_close(violation, (norms - radius).clamp(min=0))
    assert bool((violation > 0).any()) and bool((violation == 0).any())
    assert decay_for_radius(radius, 1.3) == pytest.approx(0.7)
    assert radius_of_decay(0.0) == math.inf
    assert not ball_violation(W, 0.0).any() and not constraint_ratio(W, 0.0).any()
    with pytest.raises(ValueError, match="factor positive"):
        ball_violation(W, 0.1, 0.0)
    with pytest.raises(ValueError, match="radius and factor must be positive"):
        decay_for_radius(0.0)


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (8, 8)])
def test_all_singular_values_at_the_radius_are_entries_of_rms_two_tenths_over_lambda_with_the_default_scale(shape):
    radius = radius_of_decay(0.5, schatten.scales.Scale("adamw-rms").factor(*shape))
    W = radius * schatten.polar(torch.randn(shape, dtype=F64), tol=1e-9)
    assert W.square().mean().sqrt().item() == pytest.approx(0.2 / 0.5, rel=1e-6)


SPECTRAL = {name: K for name, K in instances().items() if lift_of(K) in ("spectrum", "matrix")}


@pytest.mark.parametrize("name", SPECTRAL)
def test_no_direction_of_a_map_is_longer_than_its_bound_which_large_signals_reach(name):
    K, bound = SPECTRAL[name], direction_bound(SPECTRAL[name])
    if any("rows" in repr(part) or "entries" in repr(part) for part in getattr(K, "maps", ())):
        assert bound is None
        return
    u, v = torch.randn(5, 1, dtype=F64), torch.randn(1, 4, dtype=F64)
    S = torch.stack([1e6 * u @ v, torch.randn(5, 4, dtype=F64), 1e6 * torch.randn(5, 4, dtype=F64)])
    norms = torch.linalg.matrix_norm(K.grad(S), ord=2)
    if bound == math.inf:
        # 0.25 is the smallest power among them.
        assert norms[0] > 1e6**0.25
    else:
        assert (norms <= bound * (1 + 1e-9)).all()
        # Log-smoothed directions s / (s + a) of s = 1e6 are 1e-6 a short of it.
        assert norms[0] == pytest.approx(bound, rel=1e-5)


def test_maps_that_are_no_functions_of_singular_values_have_no_bound():
    for K in (maps.L1(), maps.L1(over="rows"), maps.Huber(0.3, over="entries"), maps.Huber(0.3, relative="frobenius")):
        assert direction_bound(K) is None


def test_a_bounded_map_draws_weights_to_its_bound_times_c_over_lambda():
    for K in (maps.Clip(0.3, solver=SVD), maps.Schatten(4.0, solver=SVD), 0.5 * maps.Nuclear(SVD) + 0.25 * maps.Frobenius()):
        p = nn.Parameter(9 * torch.randn(SHAPE, dtype=F64))
        opt = schatten.LionK([p], K, lr=0.05, weight_decay=0.5, decay="explicit")
        bound = direction_bound(K)
        assert bound is not None
        violation = ball_violation(p.detach(), 0.5, bound).item()
        for _ in range(60):
            p.grad = torch.randn(SHAPE, dtype=F64) - p.detach()
            opt.step()
            after = ball_violation(p.detach(), 0.5, bound).item()
            assert after <= 0.975 * violation + PRECISION
            violation = after
