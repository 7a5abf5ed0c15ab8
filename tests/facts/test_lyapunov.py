"""V_K falls in every step of a deterministic run but for the curvature of the step (arXiv 2506.15054, for any K)."""

from typing import Any

import pytest
import torch
from torch import nn

import schatten
from schatten import maps, signals
from schatten.diagnostics.constraint import ball_violation
from schatten.diagnostics.fenchel_young import settled
from schatten.diagnostics.lyapunov import betas_of, first_growth, lyapunov, lyapunov_change_bound, lyapunov_constant
from schatten.retractions import DecoupledDecay
from tests.facts.lyapunov_problems import MAPS, ROUNDING, STEPS, SVD, problems, slacks

F64 = torch.float64


def test_the_lyapunov_inequality_holds_on_400_random_problems_of_20_steps_without_violation():
    found = [(four.name, four.decay, slacks(four)) for four in problems(100)]
    assert sum(len(slack) for *_, slack in found) == 400 * STEPS == 8000
    assert {name for name, *_ in found} == set(MAPS)
    assert not [(name, decay, min(slack)) for name, decay, slack in found if min(slack) < -ROUNDING]
    # And it is no empty statement: some steps use all of it but a millionth of V_K.
    assert min(min(slack) for *_, slack in found) < 1e-6


def test_the_first_two_terms_of_the_bound_are_never_positive_and_the_third_is_at_most_2_L_lr2_r():
    for four in problems(34, seed=1):
        X = four.start.clone().requires_grad_()
        (G,) = torch.autograd.grad(four.loss(X).sum(), X)
        c = schatten.scales.Scale(four.scale).factor(*four.start.shape[-2:])
        numbers = (four.smoothness, four.lr, four.weight_decay, four.betas, c)
        decay: Any = four.decay
        bound = lyapunov_change_bound(four.map, four.start, four.momentum, G, *numbers, decay=decay)
        small = ROUNDING * (1 + bound.total.abs())
        assert (bound.residual <= small).all() and (bound.monotone <= small).all() and (bound.curvature >= 0).all()
        if four.name == "nuclear" and decay == "implicit":
            most = 2 * four.smoothness * (four.lr * c) ** 2 * min(four.start.shape[-2:])
            assert (bound.curvature <= most * (1 + ROUNDING)).all()


def test_with_equal_betas_the_monotone_term_is_absent():
    W, M, G = torch.randn(3, 2, 4, 3, dtype=F64).unbind(0)
    bound = lyapunov_change_bound(maps.Huber(0.3, solver=SVD), 0.1 * W, M, G, 1.0, 0.1, 0.5, (0.9, 0.9))
    # M+ and N differ by rounding only, and so do their directions.
    assert (bound.monotone.abs() < 1e-14).all()


def test_an_explicit_step_is_an_implicit_one_of_length_lr_over_one_minus_lr_lambda():
    W, D = torch.randn(2, 1, 4, 3, dtype=F64).unbind(0)
    lr, decay = 0.3, 0.7
    longer = lr / (1 - lr * decay)
    explicit, _ = DecoupledDecay("explicit")(W, D, lr, {}, {"lr": lr, "weight_decay": decay})
    implicit, _ = DecoupledDecay("implicit")(W, D, longer, {}, {"lr": longer, "weight_decay": decay})
    torch.testing.assert_close(explicit, implicit, rtol=1e-14, atol=1e-14)
    constant = lyapunov_constant(lr, decay, (0.5, 0.9), decay="explicit")
    assert constant == pytest.approx(lyapunov_constant(longer, decay, (0.5, 0.9)), rel=1e-14)
    assert constant == pytest.approx(lr * 0.5 / ((1 - lr * decay) * 0.1 + lr * decay * 0.5), rel=1e-14)


def runs():
    options = {"lr": 0.05, "weight_decay": 0.4, "decay": "implicit", "scale": "keller"}
    yield "Muon with Nesterov", lambda p: schatten.Muon(p, momentum=0.9, solver=SVD, **options)
    yield "Muon without", lambda p: schatten.Muon(p, momentum=0.9, nesterov=False, solver=SVD, **options)
    yield "paper", lambda p: schatten.LionK(p, maps.Huber(0.3, solver=SVD), betas=(0.7, 0.95), **options)
    yield "site", lambda p: schatten.LionK(p, maps.Huber(0.3, solver=SVD), betas=(0.8, 0.9), form="site", **options)


@pytest.mark.parametrize(("name", "build"), list(runs()), ids=[name for name, _ in runs()])
def test_the_inequality_holds_with_the_betas_that_a_signal_stands_for(name, build):
    P = torch.randn(6, 6, dtype=F64)
    L = torch.linalg.matrix_norm(P, ord=2).square().item()
    target = 5 * torch.randn(6, 3, dtype=F64)
    p = nn.Parameter(torch.zeros(6, 3, dtype=F64))
    opt = build([p])
    (group,) = opt.param_groups
    rule = opt.rule(group)
    numbers = (group["lr"], group["weight_decay"], betas_of(rule.signal, group), rule.scale.factor(6, 3))
    before = None
    for _ in range(200):
        W, M = p.detach().clone(), opt.state[p]["momentum_buffer"].view(6, 3).clone()
        p.grad = P.mT @ P @ (W - target)
        V = lyapunov(rule.map, W, M, (P @ (W - target)).square().sum() / 2, *numbers)
        if before is not None:
            assert V - before[0] <= before[1] + ROUNDING * (1 + V.abs())
        before = V, lyapunov_change_bound(rule.map, W, M, p.grad, L, *numbers).total
        opt.step()


@pytest.mark.parametrize(
    "signal",
    [
        signals.TwoBeta("paper"),
        signals.TwoBeta("site"),
        signals.Momentum("ema", nesterov=True),
        signals.Momentum("ema", nesterov=False),
        signals.Momentum("sum", nesterov=True),
        signals.Momentum("sum", nesterov=False),
        signals.Gradient(),
    ],
    ids=repr,
)
def test_a_signal_is_the_papers_with_its_betas(signal):
    group = {"momentum": 0.9, "betas": (0.7, 0.95)}
    betas, gain = betas_of(signal, group), settled(signal, group)
    paper, W = signals.TwoBeta("paper"), torch.zeros(1, 1, 3, 2, dtype=F64)
    own, its = signal.init(W), paper.init(W)
    for _ in range(20):
        G = torch.randn(1, 1, 3, 2, dtype=F64)
        S, own = signal(G, own, group)
        expected, its = paper(G, its, {"betas": betas})
        torch.testing.assert_close(S, gain * expected, rtol=1e-12, atol=1e-12)
        if own:
            torch.testing.assert_close(own["momentum_buffer"], gain * its["momentum_buffer"], rtol=1e-12, atol=1e-12)


def test_other_signals_have_no_betas_and_other_betas_no_constant():
    assert betas_of(schatten.signals.AdamRatio(), {"betas": (0.9, 0.99), "eps": 1e-8}) is None
    for betas in ((0.9, 0.8), (0.5, 1.0), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="0 <= beta1 <= beta2 < 1"):
            lyapunov_constant(0.1, 0.1, betas)
    with pytest.raises(ValueError, match="lr \\* weight_decay < 1"):
        lyapunov_constant(2.0, 0.5, (0.5, 0.9), decay="explicit")
    with pytest.raises(ValueError, match="decay must be"):
        lyapunov_constant(0.1, 0.5, (0.5, 0.9), decay="cautious")  # type: ignore[arg-type]


def trajectory(start, target, weight_decay, lr=0.004, steps=800):
    """V_B, V_K, the loss and the allowed rises of Muon on ||X - target||^2 / 2, from `start`."""
    K, L = maps.Nuclear(SVD), 1.0
    p = nn.Parameter(start.clone())
    opt = schatten.Muon([p], lr=lr, weight_decay=weight_decay, momentum=0.95, decay="implicit", scale="none", solver=SVD)
    numbers = (lr, weight_decay, (0.95**2, 0.95))
    violations, values, losses, allowed = [], [], [], []
    for _ in range(steps):
        W, M = p.detach().clone(), opt.state[p]["momentum_buffer"].view(W_SHAPE).clone()
        p.grad = W - target
        loss = p.grad.square().sum() / 2
        violations.append(ball_violation(W, weight_decay).item())
        values.append(lyapunov(K, W, M, loss, *numbers).item())
        losses.append(loss.item())
        allowed.append(lyapunov_change_bound(K, W, M, p.grad, L, *numbers).curvature.item())
        opt.step()
    return violations, values, losses, allowed[:-1]


W_SHAPE = (2, 2)


def test_from_inside_the_loss_spikes_and_v_k_does_not():
    """The paper's figure 3, top: lambda = 1.25, start and optimum inside the ball."""
    start = torch.diag(torch.tensor([0.7, -0.6], dtype=F64))
    target = torch.diag(torch.tensor([0.2, 0.5], dtype=F64))
    violations, values, losses, allowed = trajectory(start, target, weight_decay=1.25)
    assert max(violations) == 0
    assert first_growth(violations, values, allowed=allowed) is None
    rise = first_growth(violations, losses, allowed=allowed)
    assert rise is not None and rise.name == "V_K"  # here the loss itself, in V_K's place
    # Within what a step of lr leaves: two singular values each within lr / (1 - momentum) of the optimum.
    assert losses[-1] < (0.004 / 0.05) ** 2


def test_from_outside_to_an_optimum_outside_v_b_falls_to_the_boundary():
    """The paper's figure 3, bottom: lambda = 4."""
    start = torch.diag(torch.tensor([0.7, -0.6], dtype=F64))
    target = torch.diag(torch.tensor([0.9, 0.5], dtype=F64))
    violations, values, _, _ = trajectory(start, target, weight_decay=4.0)
    assert violations[0] == pytest.approx(0.45) and 0 < violations[-1] < 1e-5
    assert first_growth(violations, [0.0] * len(values)) is None


def test_from_outside_to_an_optimum_inside_first_v_b_falls_and_then_v_k():
    start = torch.diag(torch.tensor([0.7, -0.6], dtype=F64))
    target = torch.diag(torch.tensor([0.1, 0.2], dtype=F64))
    violations, values, losses, allowed = trajectory(start, target, weight_decay=4.0)
    assert violations[0] == pytest.approx(0.45) and violations.count(0.0) > 500
    assert first_growth(violations, values, allowed=allowed) is None
    assert values[-1] < 0.01 * values[violations.index(0.0)]
    assert first_growth(violations, losses, allowed=allowed) is not None


def test_first_growth_finds_where_either_of_the_pair_grows():
    assert first_growth([0.0] * 3, [3.0, 2.0, 2.5], allowed=[0.0, 0.6]) is None
    assert first_growth([0.0] * 3, [3.0, 2.0, 2.5], allowed=[0.6, 0.0]) == (2, "V_K", 0.5)
    assert first_growth([1.0, 0.5, 0.75], [3.0, 9.0, 9.0]) == (2, "V_B", 0.25)
    assert first_growth([0.0, 1e-12], [1.0, 1.0 + 1e-12]) is None  # rounding
    assert first_growth([], []) is None
    with pytest.raises(ValueError, match="same steps"):
        first_growth([0.0], [1.0, 2.0])
