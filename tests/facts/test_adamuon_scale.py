"""AdaMuon's update has AdamW's size from the first step on, so its second moment needs no bias correction."""

import math

import torch

import schatten
from schatten.presets.adamuon import AdaMuon
from tests.reference.twins import problem

EXACT = schatten.solvers.svd()


def steps(shape, gradients, **options):
    """The updates, W_t - W_(t+1), and the optimizer."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    opt = AdaMuon([p], lr=1.0, weight_decay=0.0, solver=EXACT, **options)
    moves = []
    for G in gradients:
        before = p.detach().clone()
        p.grad = G.clone()
        opt.step()
        moves.append(before - p.detach())
    return moves


def test_the_first_step_is_two_tenths_of_lr_in_every_entry_by_the_sign_of_the_polar_factor_of_signs():
    _, gradients = problem((5, 3))
    (move,) = steps((5, 3), gradients[:1])
    P = EXACT(gradients[0].sign())
    # P / (sqrt(0.05) |P| + eps) is one magnitude up to eps / (sqrt(0.05) |P|), 1e-6 where |P| > 0.05.
    assert P.abs().min() > 0.05
    torch.testing.assert_close(move, 0.2 * P.sign(), rtol=1e-6, atol=0)


def test_every_update_has_an_rms_of_two_tenths_of_lr():
    _, gradients = problem((3, 7))
    for move in steps((3, 7), gradients):
        torch.testing.assert_close(move.square().mean().sqrt().item(), 0.2, rtol=1e-12, atol=0)


def test_bias_correction_of_the_second_moment_would_change_nothing():
    _, gradients = problem((5, 3))
    M = V = torch.zeros(5, 3, dtype=torch.float64)
    for t, (G, move) in enumerate(zip(gradients, steps((5, 3), gradients), strict=True), start=1):
        M = 0.95 * M + 0.05 * G
        P = EXACT((0.05 * G + 0.95 * M).sign())
        V = 0.95 * V + 0.05 * P**2
        D = P / ((V / (1 - 0.95**t)).sqrt() + 1e-8)
        # Only eps is not scaled along: sqrt(V) > 0.01 here, of which it is 1e-6.
        assert t > 1 or V.sqrt().min() > 0.01
        torch.testing.assert_close(move, 0.2 * math.sqrt(15) / D.norm() * D, rtol=1e-5, atol=1e-7)


def test_the_size_of_a_gradients_entries_does_not_matter_only_their_signs():
    _, gradients = problem((5, 3), steps=1)
    squeezed = gradients.sign() * gradients.abs() ** 0.1
    assert torch.equal(*(steps((5, 3), g)[0] for g in (gradients, squeezed)))
