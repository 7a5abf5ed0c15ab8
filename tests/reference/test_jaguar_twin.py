"""JAGUAR Muon against its equation: the same blocks, literal two-point differences, momentum on the block alone."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import schatten
from tests.reference.twins import SEEDS, SHAPES, STEPS, problem

LR, DECAY, BETA, EPS, SHARE = 0.03, 0.2, 0.8, 1e-3, 0.4


def polar(M):
    """U V^T of the compact SVD: a block's momentum has low rank, and rounding's directions are no part of it."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U * (s > 1e-6 * s[0])) @ Vh


def loss(W, b, target):
    return ((W - target) ** 2).sum() / 2 + (W**4).sum() / 4 + ((b - 1) ** 2).sum()


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_jaguar_equals_its_equation(beta):
    for shape in SHAPES:
        for seed in SEEDS:
            start, targets = problem(shape, seed)
            W, b = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(7, dtype=torch.float64))
            opt = schatten.JaguarMuon(
                [{"params": [W]}, {"params": [b], "layout": "flat"}],
                lr=LR,
                weight_decay=DECAY,
                momentum=beta,
                eps=EPS,
                share=SHARE,
                solver=schatten.solvers.svd(),
            )
            X, y = start.clone(), torch.zeros(7, dtype=torch.float64)
            M, m = torch.zeros_like(X), torch.zeros_like(y)
            for target in targets:
                value = opt.step(partial(loss, W, b, target))
                # The blocks of both parameters as the optimizer drew them: their sizes are checked, their place is random.
                E = opt.state[W]["rows"] * opt.state[W]["columns"]
                e = (opt.state[b]["rows"] * opt.state[b]["columns"]).view(7)
                assert E.sum() == math.prod(math.ceil(SHARE * n) for n in shape) and e.sum() == 3
                plus, minus = loss(X + EPS * E, y + EPS * e, target), loss(X - EPS * E, y - EPS * e, target)
                rho = (plus - minus) / (2 * EPS)
                assert math.isclose(value, (plus + minus) / 2, rel_tol=1e-9)
                M = torch.where(E > 0, beta * M + (1 - beta) * rho, M)
                m = torch.where(e > 0, beta * m + (1 - beta) * rho, m)
                X = (1 - LR * DECAY) * X - LR * polar(M)
                y = (1 - LR * DECAY) * y - LR * torch.where(e > 0, m.sign(), 0.0)
            # The difference of two losses of size 10 over 2e-3 keeps 1e-16 * 10 / 2e-3 = 1e-12 of rho; polar factors of block
            # momenta of low rank amplify it by their condition, 1e4 at most.
            assert (W - X).norm() <= 1e-6 * X.norm(), f"{shape}, seed {seed}: {(W - X).norm() / X.norm():.2g}"
            assert (b - y).norm() <= 1e-9 * y.norm()
    assert int(opt.state[W]["step"]) == STEPS


def test_two_evaluations_a_step_whatever_the_number_of_parameters_and_weights_come_back_exactly():
    params = [nn.Parameter(torch.randn(4, 3).bfloat16()) for _ in range(5)]
    before = [p.detach().clone() for p in params]
    opt, seen = schatten.JaguarMuon(params, lr=0.0), []

    def closure():
        assert not torch.is_grad_enabled()
        seen.append(1)
        return sum(p.float().sum() for p in params)

    opt.step(closure)
    assert len(seen) == 2
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_weights_come_back_when_the_closure_fails():
    W = nn.Parameter(torch.randn(4, 3))
    before = W.detach().clone()

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        schatten.JaguarMuon([W]).step(closure)
    assert torch.equal(W, before)


def test_a_step_without_closure_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"pass step\(\) a closure that returns the loss"):
        schatten.JaguarMuon([nn.Parameter(torch.zeros(2, 2))]).step()


def test_it_trains_a_model_from_values_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(64, 6)
    y = x[:, :1] * x[:, 1:2]
    opt = schatten.JaguarMuon(model, lr=1e-2, share=0.5)
    assert {entry.route for entry in opt.plan} == {"spectral"}
    losses = [float(opt.step(lambda: (model(x) - y).square().mean())) for _ in range(400)]
    # Measured 1.09 to 0.36; half is asked for.
    assert losses[-1] < losses[0] / 2
