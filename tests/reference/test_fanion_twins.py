"""Fanion-k, F-Fanion-k, Neon, F-Muon and S-Muon against the paper's equations."""

import pytest
import torch

import schatten
from tests.reference.twins import assert_equals_twin, keller, polar

LR, DECAY, BETA = 0.03, 0.4, 0.9


def leading(S, k):
    U, _, Vh = torch.linalg.svd(S, full_matrices=False)
    return U[:, :k] @ Vh[:k]


def twin(direction):
    def run(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = BETA * M + (1 - BETA) * G
            S = (1 - BETA) * G + BETA * M
            W = (1 - LR * DECAY) * W - LR * direction(S)
        return W

    return run


OPTIONS = {"lr": LR, "weight_decay": DECAY, "momentum": BETA}

# The default solver's leading vectors come from a Krylov space, exact on matrices this small but for gaps between singular
# values: an angle of 1e-8 at the smallest gap of these, about 1 %, moves 30 steps of lr 0.03 by 1e-7 of W.
KRYLOV = 1e-5


@pytest.mark.parametrize("k", [1, 2, 5])
def test_fanion_k_equals_its_equation(k):
    direction = lambda S: keller(S) * leading(S, k)  # noqa: E731
    assert_equals_twin(lambda params: schatten.Fanion(params, k, **OPTIONS), twin(direction), precision=KRYLOV)


def test_f_fanion_k_equals_its_equation():
    direction = lambda S: keller(S) * (0.3 * leading(S, 2) + 0.7 * S / S.norm())  # noqa: E731
    assert_equals_twin(lambda params: schatten.Fanion(params, 2, alpha=0.3, **OPTIONS), twin(direction), precision=KRYLOV)


def test_neon_equals_its_equation():
    direction = lambda S: keller(S) * leading(S, 1)  # noqa: E731
    assert_equals_twin(lambda params: schatten.Neon(params, **OPTIONS), twin(direction), precision=KRYLOV)


def test_f_muon_equals_its_equation_with_the_shape_factor_on_both_parts():
    direction = lambda S: keller(S) * (0.5 * polar(S) + 0.5 * S / S.norm())  # noqa: E731
    assert_equals_twin(lambda params: schatten.FMuon(params, solver=schatten.solvers.svd(), **OPTIONS), twin(direction))


def test_s_muon_equals_its_equation_with_the_shape_factor_on_the_polar_part_alone():
    direction = lambda S: 0.5 * keller(S) * polar(S) + 0.5 * 0.02 * S.sign()  # noqa: E731
    assert_equals_twin(
        lambda params: schatten.SMuon(params, eta_s=0.02, solver=schatten.solvers.svd(), **OPTIONS), twin(direction)
    )
