"""Decoupled decay keeps a rule on any map inside the set its `describe` names (Chen, Li and Liu, arXiv 2506.15054)."""

import pytest
import torch

import schatten
from schatten import maps
from tests.contracts.map_laws import exact, instances
from tests.contracts.matrices import gaussian

MAPS = {name: K for name, K in instances().items() if not isinstance(K, maps.Sum)}


@pytest.mark.parametrize("name", MAPS)
def test_weights_that_start_inside_stay_inside_whatever_the_gradients(name):
    # Every direction lies in the convex, symmetric domain of K*, and W lambda / c is a mean of directions.
    K = MAPS[name]
    W = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    rule = schatten.Rule(map=K, scale=schatten.scales.Scale("keller"))
    weight_decay = 0.7
    opt = schatten.SpectralOptimizer([W], rule, lr=0.2, weight_decay=weight_decay, momentum=0.5)
    for step in range(25):
        W.grad = (10.0 ** (step % 5 - 2)) * gaussian(5, 8, seed=step)
        opt.step()
        inside = W.detach() * weight_decay / rule.scale.factor(5, 8)
        assert K.violation(inside) == 0
    assert W.abs().max() > 0


@pytest.mark.parametrize(
    "K",
    [exact(maps.Nuclear), maps.Frobenius(), maps.L1(), maps.L1(over="rows"), exact(maps.KyFan, 2), exact(maps.Schatten, 4.0)],
    ids=repr,
)
def test_weights_that_start_outside_come_in_at_the_rate_of_the_decay(K):
    W = torch.nn.Parameter(5 * gaussian(5, 8))
    lr, weight_decay = 0.1, 0.5
    rule = schatten.Rule(map=K, scale=schatten.scales.Scale("none"))
    opt = schatten.SpectralOptimizer([W], rule, lr=lr, weight_decay=weight_decay, momentum=0.0)
    outside = float(K.violation(weight_decay * W.detach()))
    for step in range(40):
        W.grad = gaussian(5, 8, seed=step)
        opt.step()
        now = float(K.violation(weight_decay * W.detach()))
        # The gauge of a norm ball less one shrinks by 1 - lr lambda at least; rounding of fp64.
        assert now <= (1 - lr * weight_decay) * outside + 1e-12
        outside = now


def test_a_model_trains_on_maps_beyond_muons():
    torch.manual_seed(0)
    X = torch.randn(256, 16)
    Y = X @ torch.randn(16, 8)
    relative = maps.LogCosh(0.1, relative="frobenius")
    # A power keeps part of the gradient's scale, which is small here.
    for K, lr in (
        (maps.Power(0.25), 3e-2),
        (relative, 1e-2),
        (0.5 * maps.Nuclear() + 0.01 * maps.L1(), 3e-2),
        (maps.KyFan(2), 4e-2),
    ):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        opt = schatten.SpectralOptimizer(model, schatten.Rule(map=K), lr=lr, momentum=0.9)
        losses = []
        for _ in range(60):
            loss = torch.nn.functional.mse_loss(model(X), Y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], repr(K)
        assert repr(K) in opt.state_dict()["param_groups"][0]["rule"]
