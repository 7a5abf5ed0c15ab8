"""Muon with decay lambda is constrained descent: weights enter the spectral ball of radius c / lambda and stay (2506.15054)."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers

SHAPE = (12, 3)


def excess(W, radius):
    """V_B: how far the spectral norm is beyond the ball's radius."""
    return max(0.0, torch.linalg.matrix_norm(W.detach().double(), ord=2).item() - radius)


@pytest.mark.parametrize("scale", ["adamw-rms", "keller", "mup", "none"])
@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("start", [10.0, 0.0], ids=["from outside", "from inside"])
def test_the_distance_from_the_ball_shrinks_at_every_step_by_the_rate_of_the_decay(decay, scale, start):
    p = nn.Parameter(start * torch.randn(SHAPE, dtype=torch.float64))
    lr, weight_decay = 0.1, 0.5
    opt = schatten.Muon([p], lr=lr, weight_decay=weight_decay, decay=decay, scale=scale, solver=solvers.svd())
    radius = schatten.scales.Scale(scale).factor(*SHAPE) / weight_decay
    rate = 1 - lr * weight_decay if decay == "explicit" else 1 / (1 + lr * weight_decay)
    bound = excess(p, radius)
    for _ in range(100):
        # Whatever the gradients are: here random ones with a common part, which drives the weights outward.
        p.grad = torch.randn(SHAPE, dtype=torch.float64) - 1
        opt.step()
        bound *= rate
        assert excess(p, radius) <= bound + 1e-12 * radius  # fp64 rounding of a spectral norm
    assert (bound > 0) == (start > 0)


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({"scale": "keller"}, 4.0),
        ({"scale": "adamw-rms"}, 0.2 * math.sqrt(12) / 0.5),
        ({"scale": "mup"}, 4.0),
        ({"scale": "none"}, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("exact", [True, False], ids=["svd", "default solver"])
def test_a_far_target_leaves_a_12_by_3_weight_on_the_sphere_that_the_shape_factor_moves(options, norm, decay, exact):
    solver = {"solver": solvers.svd()} if exact else {}
    target = 100 * torch.randn(SHAPE)
    p = nn.Parameter(torch.zeros(SHAPE))
    opt = schatten.Muon([p], lr=0.05, weight_decay=0.5, decay=decay, **options, **solver)
    for _ in range(500):
        p.grad = p.detach() - target
        opt.step()
    spectrum = torch.linalg.svdvals(p.detach())
    # All singular values settle at c / lambda, within 0.975^500 = 3e-6 and fp32 rounding; the default solver's
    # direction has singular values within 16 % of 1, and 3 % more for bf16 products.
    torch.testing.assert_close(spectrum, torch.full((3,), norm), rtol=1e-4 if exact else 0.19, atol=0)


def test_the_rule_says_which_ball_that_is():
    opt = schatten.Muon([nn.Parameter(torch.zeros(SHAPE))], weight_decay=0.5, scale="keller")
    rule = opt.rule(opt.param_groups[0])
    assert rule.describe(0.5, *SHAPE) == "min F subject to spectral norm <= 4.0"


def test_a_near_target_is_reached_without_bias_from_the_decay():
    # Inside the ball decay does not move the minimum of F: W = target is stationary up to the step's length, unlike L2 decay,
    # whose minimum would be target / (1 + lambda).
    target = torch.randn(SHAPE)
    target *= 0.5 * 4.0 / torch.linalg.matrix_norm(target, ord=2)
    p = nn.Parameter(torch.zeros(SHAPE))
    opt = schatten.Muon([p], lr=0.05, weight_decay=0.5, momentum=0.0, scale="keller", solver=solvers.svd())
    for t in range(2000):
        opt.param_groups[0]["lr"] = 0.05 / (1 + t / 50)
        p.grad = p.detach() - target
        opt.step()
    # The last steps have lr 1.2e-3 and length 2 lr in each of three directions; the iterates circle at that distance.
    assert torch.linalg.matrix_norm(p.detach() - target, ord=2) < 3 * 2 * 1.3e-3
