"""NorMuon is Muon wherever the rows it would equalise are equal already."""

import pytest
import torch

import schatten
from schatten.presets.normuon import NorMuon
from tests.reference.twins import PRECISION, problem, trained

OPTIONS = {"lr": 0.02, "weight_decay": 0.3, "solver": schatten.solvers.svd()}


def muon(params):
    return schatten.Muon(params, scale="keller", **OPTIONS)


def distance(build, shape):
    """How far from Muon it ends, beside Muon's way."""
    W, gradients = problem(shape)
    (ours, _), (theirs, _) = trained(build, W, gradients), trained(muon, W, gradients)
    return ((ours - theirs).norm() / (theirs - W).norm()).item()


@pytest.mark.parametrize("shape", [(3, 7), (4, 4), (1, 5)], ids=str)
def test_on_wide_full_rank_signals_normuon_is_muon(shape):
    # Every row of such a polar factor has norm 1.
    assert distance(lambda params: NorMuon(params, **OPTIONS), shape) < PRECISION


def test_on_tall_signals_it_is_not():
    # The rows of a 7 x 3 polar factor have norms between 0 and 1, 0.65 in RMS.
    assert distance(lambda params: NorMuon(params, **OPTIONS), (7, 3)) > 0.01


def with_equal_rows(beta2):
    def build(params):
        opt = NorMuon(params, beta2=beta2, **OPTIONS)
        opt.state[params[0]]["exp_avg_row_sq"].fill_(0.1)
        return opt

    return build


def test_with_equal_second_moments_that_no_longer_change_normuon_is_muon():
    # In 30 steps 1 - beta2 = 1e-13 moves v by at most 3e-12, 3e-11 of itself, and a row by half of that.
    assert distance(with_equal_rows(1 - 1e-13), (7, 3)) < 1e-10
    assert distance(with_equal_rows(0.95), (7, 3)) > 0.01


def test_the_first_update_has_equal_rows_of_the_polar_factors_size():
    p = torch.nn.Parameter(torch.zeros(7, 3, dtype=torch.float64))
    opt = NorMuon([p], lr=1.0, scale="none", solver=OPTIONS["solver"])
    p.grad = problem((7, 3))[1][0]
    opt.step()
    # v is 0.05 times the mean squares of the rows themselves; only eps = 1e-10 beside sqrt(v) > 1e-3 tells rows apart.
    assert opt.state[p]["exp_avg_row_sq"].min() > 1e-6
    torch.testing.assert_close(p.detach().norm(dim=1), torch.full((7,), (3 / 7) ** 0.5, dtype=torch.float64), rtol=1e-7, atol=0)
