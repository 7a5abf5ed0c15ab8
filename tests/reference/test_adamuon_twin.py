"""AdaMuon (arXiv 2507.11005) against its formula."""

import math

import torch

import schatten
from schatten.presets.adamuon import AdaMuon
from tests.reference.twins import assert_equals_twin, spectral

LR, DECAY = 0.03, 0.3


def polar_of_signs(S):
    # Matrices of signs are often singular: their null directions get 0. Other singular values of these are above 0.1.
    return spectral(torch.sign(S), lambda s: (s > 1e-9).to(s))


def test_adamuon_equals_its_formula():
    def twin(W, gradients):
        M = V = torch.zeros_like(W)
        for G in gradients:
            M = 0.95 * M + 0.05 * G
            P = polar_of_signs(0.05 * G + 0.95 * M)
            V = 0.95 * V + 0.05 * P**2
            D = P / (V.sqrt() + 1e-8)
            W = (1 - LR * DECAY) * W - LR * 0.2 * math.sqrt(W.numel()) / D.norm() * D
        return W

    # An entry of P that is 0 comes out as 1e-17 either way, and while its V is, eps = 1e-8 makes 1e-9 of it beside 1.
    assert_equals_twin(
        lambda params: AdaMuon(params, lr=LR, weight_decay=DECAY, solver=schatten.solvers.svd()), twin, precision=1e-8
    )
