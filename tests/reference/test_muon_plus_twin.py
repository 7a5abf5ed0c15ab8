"""Muon+ (arXiv 2602.21545), all its norms, against row by row and column by column formulas."""

import pytest
import torch

import schatten
from schatten.presets.muon_plus import MuonPlus
from tests.reference.twins import assert_equals_twin, mup, polar

LR, DECAY = 0.03, 0.3


def unit_rows(P):
    return torch.stack([row / (row @ row + 1e-7).sqrt() for row in P])


def unit_columns(P):
    return unit_rows(P.T).T


NORMS = {
    "row": unit_rows,
    "col": unit_columns,
    "col_row": lambda P: unit_rows(unit_columns(P)),
    "row_col": lambda P: unit_columns(unit_rows(P)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_muon_plus_equals_its_formula(norm):
    def twin(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = 0.95 * M + G
            W = (1 - LR * DECAY) * W - LR * mup(W) * NORMS[norm](polar(G + 0.95 * M))
        return W

    assert_equals_twin(
        lambda params: MuonPlus(params, lr=LR, weight_decay=DECAY, norm=norm, solver=schatten.solvers.svd()), twin
    )
