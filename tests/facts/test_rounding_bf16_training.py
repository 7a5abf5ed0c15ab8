"""bf16 weights train: small steps and decay, lost to rounding to nearest, act on average; momentum keeps its digits."""

import math

import pytest
import torch
from torch import nn

import schatten

LR, DECAY, STEPS = 1e-5, 0.1, 1000

# Below 1/8 the numbers of bf16 are 2^-11 apart. The count is the least at which the bound below is decisive.
START, GAP = 0.125, 2**-11
ROWS, COUNT = 2, 1 << 14


def mean_changes(runs, steps):
    """Mean change of equal weights under a constant gradient of ones, by Muon as a matrix and by AdamW as a vector."""
    params, groups = {}, []
    for dtype, rounding in runs:
        for algorithm, shape in (("spectral", (ROWS, COUNT // ROWS)), ("adamw", (COUNT,))):
            params[dtype, algorithm] = p = nn.Parameter(torch.full(shape, START, dtype=dtype))
            groups.append({"params": p, "algorithm": algorithm, "rounding": rounding})
    opt = schatten.Muon(groups, lr=LR, weight_decay=DECAY, solver=schatten.solvers.polynomial(dtype="float32"))
    for p in params.values():
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        opt.step()
    return {key: (p.detach().double().mean() - START).item() for key, p in params.items()}


@pytest.fixture(scope="module")
def changes():
    return mean_changes([(torch.float32, "nearest"), (torch.bfloat16, "stochastic")], STEPS)


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_bf16_weights_follow_fp32_on_average_at_a_learning_rate_far_below_their_precision(changes, algorithm):
    change, expected = changes[torch.bfloat16, algorithm], changes[torch.float32, algorithm]
    # Each weight is a martingale around the fp32 path that jumps by GAP with probability |step| / GAP, so over the run its
    # variance is |expected| GAP and that of the mean 1 / COUNT of it. 2 % must lie beyond four of these deviations.
    deviation = math.sqrt(abs(expected) * GAP / COUNT)
    assert 4 * deviation < 0.02 * abs(expected)
    assert abs(change - expected) < 0.02 * abs(expected)


def test_rounding_to_nearest_loses_every_one_of_these_steps(changes):
    # The mistake this guards against: the longest step, 1e-5, is 1/50 of the gap and never survives rounding to nearest.
    # All steps are equal, so 20 that go nowhere are as good as 1000.
    lost = mean_changes([(torch.bfloat16, "nearest")], 20)
    assert all(change == 0 for change in lost.values())
    assert all(change < -1e-3 for change in changes.values())


def test_the_fp32_run_moves_as_far_as_lr_decay_and_scale_say(changes):
    decay = LR * DECAY * STEPS * START
    # A rank-one direction of ones has entries 1 / sqrt(rows n), which the scale 0.2 sqrt(n) makes 0.2 / sqrt(rows); the
    # solver leaves its singular value within 16 % of 1. AdamW's update is 1 here.
    low, high = (LR * STEPS * 0.2 / math.sqrt(ROWS) * (1 + s * 0.16) + decay for s in (-1, 1))
    assert low < -changes[torch.float32, "spectral"] < high
    # Decay sees weights shrink by up to 8 % on the way, so its share of 1.2 % is off by 4 % of itself; fp32 weights
    # round each step of 1e-5 to half an ulp of 2^-27, 0.04 %, always in the same direction.
    assert -changes[torch.float32, "adamw"] == pytest.approx(LR * STEPS + decay, rel=0.003)


def test_bf16_weights_decay_without_any_gradient_signal():
    p = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    opt = schatten.Muon([p], lr=1e-3, weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        opt.step()
    # (1 - 1e-4)^1000 = 0.90483; the mean of 16384 weights has standard deviation sqrt(0.095 * 2^-8 / 16384) = 1.5e-4.
    assert abs(p.detach().double().mean().item() - 0.90483) < 5 * 1.5e-4


@pytest.mark.parametrize("form", ["ema", "sum"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_bf16_weights_is_that_of_fp32_weights(nesterov, form):
    # The mistake this guards against: torch.optim.Muon 2.13 normalises the buffer itself for bf16 without Nesterov.
    generator = torch.Generator().manual_seed(0)
    gradients = 100 * torch.randn(10, 16, 8, generator=generator)
    buffers = []
    for dtype in (torch.bfloat16, torch.float32):
        p = nn.Parameter(torch.zeros(16, 8, dtype=dtype))
        opt = schatten.Muon([p], nesterov=nesterov, form=form)
        for g in gradients:
            p.grad = g.to(dtype)
            opt.step()
        buffers.append(opt.state[p]["momentum_buffer"])
    # Only the gradients are rounded to bf16: at most 2^-9 each, so well below 0.02 whatever their sum.
    assert (buffers[0] - buffers[1]).norm() < 0.005 * buffers[1].norm()
    assert buffers[0].dtype == torch.float32
