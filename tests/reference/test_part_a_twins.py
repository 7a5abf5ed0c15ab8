"""Muon++, simplified Muon and Scion against their equations."""

import pytest
import torch

import schatten
from tests.reference.twins import assert_equals_twin, mup, polar

LR, DECAY, BETA = 0.03, 0.4, 0.9


def test_muon_plus_plus_equals_its_equation():
    def twin(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = BETA * M + (1 - BETA) * G
            O = polar((1 - BETA) * G + BETA * M)  # noqa: E741
            W = (1 - LR * DECAY) * W - LR * mup(W) * O / torch.linalg.matrix_norm(O, ord=2)
        return W

    options = {"lr": LR, "weight_decay": DECAY, "momentum": BETA, "solver": schatten.solvers.svd()}
    assert_equals_twin(lambda params: schatten.MuonPlusPlus(params, **options), twin)


def test_muon_plus_plus_divides_out_what_a_loose_solver_overshoots():
    W = torch.nn.Parameter(torch.zeros(24, 40))
    opt = schatten.MuonPlusPlus([W], lr=1.0, solver=schatten.solvers.newton_schulz())
    W.grad = torch.randn(24, 40)
    opt.step()
    # Keller's quintic reaches 1.2; power iteration on its band leaves 3 % at worst.
    assert torch.linalg.matrix_norm(W.detach(), ord=2).item() / (24 / 40) ** 0.5 == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("adaptive", [True, False])
def test_simplified_muon_equals_its_equation(adaptive):
    def twin(W, gradients):
        for G in gradients:
            W = (1 - LR * DECAY) * W - LR * (torch.linalg.svdvals(G).sum() if adaptive else 1.0) * polar(G)
        return W

    assert_equals_twin(lambda params: schatten.SimplifiedMuon(params, lr=LR, weight_decay=DECAY, adaptive=adaptive), twin)


@pytest.mark.parametrize("ball", ["spectral", "sign"])
@pytest.mark.parametrize("constrained", [True, False])
def test_scion_equals_its_equation(ball, constrained):
    radius = 5.0

    def lmo(M):
        return -mup(M) * polar(M) if ball == "spectral" else -M.sign() / M.shape[1]

    def twin(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = BETA * M + (1 - BETA) * G
            W = ((1 - LR) * W if constrained else W) + LR * radius * lmo(M)
        return W

    def build(params):
        groups = [{"params": params, "ball": ball, "radius": radius}]
        return schatten.Scion(groups, lr=LR, momentum=BETA, constrained=constrained, solver=schatten.solvers.svd())

    assert_equals_twin(build, twin)
