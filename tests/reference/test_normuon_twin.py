"""NorMuon (arXiv 2510.05491) against its formula, row by row."""

import pytest
import torch

import schatten
from schatten.presets.normuon import NorMuon
from tests.reference.twins import adamw_rms, assert_equals_twin, keller, polar

LR, DECAY = 0.03, 0.3


@pytest.mark.parametrize(("scale", "factor"), [("keller", keller), ("adamw-rms", adamw_rms)])
def test_normuon_equals_its_formula(scale, factor):
    def twin(W, gradients):
        M, v = torch.zeros_like(W), torch.zeros(len(W), dtype=W.dtype)
        for G in gradients:
            M = 0.95 * M + 0.05 * G
            P = polar(0.05 * G + 0.95 * M)
            D = torch.zeros_like(P)
            for i, row in enumerate(P):
                v[i] = 0.95 * v[i] + 0.05 * (row**2).mean()
                D[i] = row / (v[i].sqrt() + 1e-10)
            D = D * P.norm() / D.norm()
            W = (1 - LR * DECAY) * W - LR * factor(W) * D
        return W

    assert_equals_twin(
        lambda params: NorMuon(params, lr=LR, weight_decay=DECAY, scale=scale, solver=schatten.solvers.svd()), twin
    )
