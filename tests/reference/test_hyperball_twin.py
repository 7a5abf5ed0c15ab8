"""Hyperball, MuonH (arXiv 2606.16899), against its formula."""

import torch

import schatten
from schatten.presets.hyperball import Hyperball
from tests.reference.twins import assert_equals_twin, polar


def test_hyperball_equals_its_formula():
    def twin(W, gradients):
        R, M = W.norm(), torch.zeros_like(W)
        for G in gradients:
            M = 0.95 * M + 0.05 * G
            P = polar(0.05 * G + 0.95 * M)
            V = W - 0.018 * W.norm() * P / P.norm()
            W = R * V / V.norm()
        return W

    assert_equals_twin(lambda params: Hyperball(params, solver=schatten.solvers.svd()), twin)
