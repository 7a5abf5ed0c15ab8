"""MuonEq (arXiv 2603.28254), all its forms, against entry by entry formulas."""

import math

import pytest
import torch

import schatten
from schatten.presets.muon_eq import MuonEq
from tests.reference.twins import adamw_rms, assert_equals_twin, polar

LR, DECAY = 0.03, 0.3


def equilibrated(S, form):
    X = torch.zeros_like(S)
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            row, column = math.sqrt((S[i] ** 2).sum()), math.sqrt((S[:, j] ** 2).sum())
            X[i, j] = S[i, j] / {"rows": row, "columns": column, "both": row * column}[form]
    return X


@pytest.mark.parametrize("form", ["rows", "columns", "both"])
def test_muon_eq_equals_its_formula(form):
    def twin(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = 0.95 * M + 0.05 * G
            W = (1 - LR * DECAY) * W - LR * adamw_rms(W) * polar(equilibrated(0.05 * G + 0.95 * M, form))
        return W

    assert_equals_twin(lambda params: MuonEq(params, lr=LR, weight_decay=DECAY, form=form, solver=schatten.solvers.svd()), twin)
