"""Every way to the weight but plain decay, on Muon's direction with an exact solver, against its formula written out."""

import math

import pytest
import torch

import schatten
from schatten.retractions import CautiousDecay, DecoupledDecay, FixedNorm, TiedDecay, UpdateFloor
from tests.reference.twins import assert_equals_twin, keller, polar

LR, DECAY, BETA = 0.05, 0.3, 0.9


def build(retraction, schedule=None, decay=DECAY):
    """Muon's rule with another retraction; `schedule` multiplies lr by its value at the number of steps done."""

    def built(params):
        rule = schatten.Rule(
            map=schatten.maps.Nuclear(schatten.solvers.svd()), scale=schatten.scales.Scale("keller"), retraction=retraction
        )
        opt = schatten.SpectralOptimizer(params, rule, lr=LR, weight_decay=decay, momentum=BETA)
        if schedule is not None:
            scheduler = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
            opt.register_step_post_hook(lambda *_: scheduler.step())
        return opt

    return built


def updates(W, gradients):
    """U = c msign(S) of the Nesterov average, step by step."""
    M = torch.zeros_like(W)
    for G in gradients:
        M = BETA * M + (1 - BETA) * G
        yield keller(W) * polar((1 - BETA) * G + BETA * M)


def decayed(W, U, cautious):
    """W where decay acts."""
    if not cautious:
        return W
    return torch.where(U * W > 0, W, torch.zeros_like(W))


def test_cautious_decay_equals_its_formula():
    def twin(W, gradients):
        for U in updates(W, gradients):
            W = W - LR * DECAY * decayed(W, U, cautious=True) - LR * U
        return W

    assert_equals_twin(build(CautiousDecay()), twin)


@pytest.mark.parametrize("cautious", [False, True], ids=["decoupled", "cautious"])
def test_tied_decay_equals_its_formula_under_a_schedule(cautious):
    def schedule(t):
        return 1.5 / (1 + 0.2 * t)  # so that the first lr is not lr_0

    def twin(W, gradients):
        for t, U in enumerate(updates(W, gradients)):
            lr = LR * schedule(t)
            W = W - lr**2 * DECAY / LR * decayed(W, U, cautious) - lr * U
        return W

    retraction = TiedDecay(CautiousDecay() if cautious else DecoupledDecay())
    assert_equals_twin(build(retraction, schedule), twin)


def test_tied_implicit_decay_equals_its_formula_under_a_schedule():
    def schedule(t):
        return 0.8**t

    def twin(W, gradients):
        for t, U in enumerate(updates(W, gradients)):
            lr = LR * schedule(t)
            W = (W - lr * U) / (1 + lr**2 * DECAY / LR)
        return W

    assert_equals_twin(build(TiedDecay(DecoupledDecay("implicit")), schedule), twin)


@pytest.mark.parametrize(("over", "ratio"), [("matrix", 0.45), ("rows", 0.45)])
def test_update_floor_equals_its_formula_and_needs_no_decay(over, ratio):
    lifted = []

    def floored(U, W):
        size, least = math.sqrt((U**2).sum()), ratio * math.sqrt((W**2).sum())
        lifted.append(size < least)
        return U * least / size if size < least else U

    def twin(W, gradients):
        for U in updates(W, gradients):
            if over == "matrix":
                U = floored(U, W)
            else:
                U = torch.stack([floored(u, w) for u, w in zip(U, W, strict=True)])
            W = W - LR * U
        return W

    assert_equals_twin(build(UpdateFloor(ratio, over)), twin)
    assert 0.1 < sum(lifted) / len(lifted) < 0.9, "one of the two cases is hardly tried"


def test_fixed_norm_equals_its_formula_and_needs_neither_decay_nor_shape_factor():
    def twin(W, gradients):
        R = math.sqrt((W**2).sum())
        for U in updates(W, gradients):
            V = W - LR * W.norm() * U / U.norm()
            W = R * V / V.norm()
        return W

    assert_equals_twin(build(FixedNorm()), twin)
