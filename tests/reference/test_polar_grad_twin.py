"""PolarGrad, momentum first (arXiv 2505.21799), against its formula."""

import pytest
import torch

import schatten
from schatten.presets.polar_grad import PolarGrad
from tests.reference.twins import assert_equals_twin, spectral

LR, DECAY = 0.03, 0.3


@pytest.mark.parametrize("nesterov", [False, True])
def test_polar_grad_equals_its_formula(nesterov):
    def twin(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = 0.95 * M + 0.05 * G
            S = 0.05 * G + 0.95 * M if nesterov else M
            W = (1 - LR * DECAY) * W - LR * spectral(S, lambda s: s.sum() * torch.ones_like(s))
        return W

    options = {"nesterov": True} if nesterov else {}
    assert_equals_twin(
        lambda params: PolarGrad(params, lr=LR, weight_decay=DECAY, solver=schatten.solvers.svd(), **options), twin
    )
