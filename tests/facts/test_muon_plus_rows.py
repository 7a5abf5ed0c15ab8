"""Muon+ normalises rows or columns that a polar factor of the right shape has normalised already."""

import pytest
import torch

import schatten
from schatten.presets.muon_plus import MuonPlus, Normalised
from tests.reference.twins import problem, trained

OPTIONS = {"lr": 0.02, "weight_decay": 0.3, "scale": "mup", "solver": schatten.solvers.svd()}


@pytest.mark.parametrize(
    ("shape", "norm", "same"),
    [
        ((3, 7), "row", True),
        ((7, 3), "col", True),
        ((4, 4), "row_col", True),
        ((4, 4), "col_row", True),
        ((7, 3), "row", False),
        ((3, 7), "col", False),
    ],
    ids=str,
)
def test_rows_of_wide_and_columns_of_tall_polar_factors_are_of_norm_one_so_muon_plus_is_muon_there(shape, norm, same):
    W, gradients = problem(shape)
    ours, _ = trained(lambda params: MuonPlus(params, norm=norm, **OPTIONS), W, gradients)
    theirs, _ = trained(lambda params: schatten.Muon(params, **OPTIONS), W, gradients)
    distance = (ours - theirs).norm() / (theirs - W).norm()
    # eps = 1e-7 shortens a unit row by 5e-8, two normalisations by 1e-7, and the sum of 30 such steps by as much.
    assert distance < 3e-7 if same else distance > 0.01


@pytest.mark.parametrize(("norm", "dim"), [("row", -1), ("col", -2), ("col_row", -1), ("row_col", -2)])
def test_what_is_normalised_last_has_norm_one(norm, dim):
    S = torch.randn(2, 1, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    D, _ = Normalised(norm, schatten.maps.Nuclear(schatten.solvers.svd()))(S, {}, {})
    # Rows of squared norm s > 0.01 end at sqrt(s / (s + 1e-7)) > 1 - 5e-6.
    torch.testing.assert_close(D.norm(dim=dim), torch.ones_like(D.norm(dim=dim)), rtol=0, atol=5e-6)


def test_a_row_of_rounding_noise_does_not_become_a_unit_row():
    S = torch.randn(1, 1, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S[0, 0, 2] *= 1e-12
    for norm in ("row", "col_row", "row_col"):
        D, _ = Normalised(norm, schatten.maps.Nuclear(schatten.solvers.svd()))(S, {}, {})
        # 1e-12 / sqrt(1e-7) = 3e-9, of a row that may be ten times as long as another.
        assert D[0, 0, 2].norm() < 1e-7 and D.isfinite().all()
