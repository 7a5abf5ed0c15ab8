"""Hyperball turns weights and keeps their norm, in bf16 and from zero as well."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten.presets.hyperball import Hyperball
from schatten.retractions import FixedNorm


def test_the_norm_of_bf16_weights_is_the_same_after_a_thousand_steps():
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter((0.02 * torch.randn(64, 64, generator=generator)).bfloat16())
    R = p.detach().double().norm().item()
    opt = Hyperball([p])
    start, worst = p.detach().clone(), 0.0
    for _ in range(1000):
        p.grad = torch.randn(64, 64, generator=generator).bfloat16()
        opt.step()
        worst = max(worst, abs(p.detach().double().norm().item() / R - 1))
    # One rounding, not a thousand: an entry is off by an ulp of at most 2^-7 of it up or down, standard deviation 2^-8 at
    # most. Of the norm that is 2^-17 on average, and 2^-8 sqrt(3 / 4096) = 1.1e-4 in standard deviation for Gaussian
    # weights; the largest of a thousand is 3.3 of these, and 5 are allowed. R read anew at every step drifts by 0.4 %.
    assert worst < 2**-17 + 5 * 2**-8 * math.sqrt(3 / 64**2)
    cosine = torch.nn.functional.cosine_similarity(p.detach().double().flatten(), start.double().flatten(), dim=0)
    assert cosine < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_zero_weights_start_moving_and_keep_the_norm_of_their_first_step(dtype):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(16, 8, dtype=dtype))
    opt = Hyperball([p], lr=0.01, solver=schatten.solvers.svd(), rounding="nearest")
    norms = []
    for t in range(5):
        p.grad = torch.randn(16, 8, generator=generator).to(dtype) * (t > 0)
        opt.step()
        norms.append(p.detach().float().norm().item())
    # A zero gradient moves nothing; the first other one lr ||D||_F = 0.01 sqrt(8), rounded by half an ulp per entry at most.
    first = 0.01 * math.sqrt(8)
    assert norms[0] == 0
    assert norms[1:] == pytest.approx([first] * 4, rel=torch.finfo(dtype).eps)
    assert opt.state[p]["radius"].item() == pytest.approx(first, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(8, 2), (2, 8), (5, 5)], ids=str)
@pytest.mark.parametrize("lr", [0.01, 0.5])
def test_a_direction_across_the_weight_turns_it_by_the_arc_tangent_of_lr_whatever_shape_and_size(shape, lr):
    W, D = torch.randn(2, 1, 1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    D = D - W * (W * D).sum() / (W * W).sum()
    for size in (1e-6, 1.0, 1e6):
        turned, _ = FixedNorm()(W, size * D, length=123.0, state={"radius": torch.zeros(1, 1, 1, 1)}, group={"lr": lr})
        # fp64 rounding, which the cosine of a small angle doubles in relative terms at worst.
        torch.testing.assert_close((W * turned).sum() / (W * W).sum(), torch.tensor(1 / math.sqrt(1 + lr**2)).double())
        torch.testing.assert_close(turned.norm(), W.norm(), rtol=1e-14, atol=0)


def test_a_step_onto_the_origin_is_undone_by_the_next():
    W = torch.tensor([[[[3.0, 4.0]]]])
    retract, group = FixedNorm(), {"lr": 1.0}
    W, state = retract(W, W.clone(), length=1.0, state=retract.init(W), group=group)
    assert W.count_nonzero() == 0
    W, state = retract(W, torch.tensor([[[[0.0, 2.0]]]]), length=1.0, state=state, group=group)
    assert W.flatten().tolist() == [0.0, -5.0] and state["radius"].item() == 5.0


def test_training_lowers_a_loss_that_sees_directions_only():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 8, generator=generator)
    p = nn.Parameter(torch.randn(8, 8, generator=generator))
    opt = Hyperball([p], lr=0.05)

    def loss():
        return 1 - torch.nn.functional.cosine_similarity(p.flatten(), target.flatten(), dim=0)

    first = loss().item()
    for _ in range(40):
        opt.zero_grad()
        loss().backward()
        opt.step()
    # 40 steps of 0.05 turn by 2 radians at most, beyond the right angle between two random matrices.
    assert loss().item() < 0.2 * first
