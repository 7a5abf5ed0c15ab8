"""Muon-MVR1, MVR2 (by closure and by previous_weights) and MARS-M against their equations."""

from functools import partial

import pytest
import torch
from torch import nn

import schatten
from tests.reference.twins import SEEDS, SHAPES, STEPS, adamw_rms, assert_equals_twin, polar, problem

LR, DECAY, BETA = 0.03, 0.4, 0.9

OPTIONS = {"lr": LR, "weight_decay": DECAY, "momentum": BETA}


def corrected(G, previous, gamma, clip):
    C = G + gamma * BETA / (1 - BETA) * (G - previous)
    return C / C.norm() if clip and C.norm() > 1 else C


def stored(gamma, clip):
    def twin(W, gradients):
        M, previous = torch.zeros_like(W), gradients[0]
        for G in gradients:
            M = BETA * M + (1 - BETA) * corrected(G, previous, gamma, clip)
            previous = G
            W = (1 - LR * DECAY) * W - LR * adamw_rms(W) * polar(M)
        return W

    return twin


@pytest.mark.parametrize(("gamma", "clip"), [(0.025, True), (0.1, False), (1.0, False), (0.0, True)])
def test_mvr1_equals_its_equation(gamma, clip):
    build = lambda params: schatten.MuonMVR(params, gamma=gamma, clip=clip, solver=schatten.solvers.svd(), **OPTIONS)  # noqa: E731
    assert_equals_twin(build, stored(gamma, clip))


def test_mars_m_equals_its_released_form():
    build = lambda params: schatten.MARSM(params, solver=schatten.solvers.svd(), **OPTIONS)  # noqa: E731
    assert_equals_twin(build, stored(0.025, clip=False))


def gradient(W, sample):
    """Of f(W; sample) = 1/2 ||W - sample||^2 + 1/4 sum W^4."""
    return W - sample + W**3


def evaluated(opt, W, bias, sample, sign):
    """The loss of a sample, with its gradients."""
    opt.zero_grad()
    value = sign * (((W - sample) ** 2).sum() / 2 + (W**4).sum() / 4 + bias.sum())
    value.backward()
    return value


def second_evaluation(W, samples, gamma, clip):
    M, old = torch.zeros_like(W), W
    for sample in samples:
        M = BETA * M + (1 - BETA) * corrected(gradient(W, sample), gradient(old, sample), gamma, clip)
        old, W = W, (1 - LR * DECAY) * W - LR * adamw_rms(W) * polar(M)
    return W


@pytest.mark.parametrize("way", ["closure", "context first", "context last"])
@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
def test_mvr2_equals_its_equation_however_the_second_gradient_is_taken(way, gamma, maximize):
    sign = -1 if maximize else 1
    for shape in SHAPES:
        for seed in SEEDS:
            start, samples = problem(shape, seed)
            W, bias = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(2, dtype=torch.float64))
            opt = schatten.MuonMVR(
                [{"params": [W]}, {"params": [bias], "algorithm": "adamw"}],
                gamma=gamma,
                clip=False,
                exact=True,
                maximize=maximize,
                solver=schatten.solvers.svd(),
                **OPTIONS,
            )
            for sample in samples:
                loss = partial(evaluated, opt, W, bias, sample, sign)
                if way == "closure":
                    opt.step(loss)
                    continue
                if way == "context last":
                    loss()
                with opt.previous_weights():
                    loss()
                if way == "context first":
                    loss()
                opt.step()
            theirs = second_evaluation(start, samples, gamma, clip=False)
            # As in `twins.PRECISION`, and the differences of nearby gradients cancel two to three digits more.
            assert (W - theirs).norm() <= 1e-9 * theirs.norm(), f"{shape}, seed {seed}"
    assert int(opt.state[W]["step"]) == STEPS
