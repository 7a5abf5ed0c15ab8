"""facebookresearch/optimizers (peers.md 1.11): matrices cut into blocks, a configuration that does not pickle."""

import pickle

import pytest
import torch

import schatten
from tests.peer_bugs.helpers import SOLVERS, P, assert_caught, d, gaussian, solver_of, step, sv


def a_large_matrix_is_one_matrix(optimizer):
    # Four blocks of 1024 columns, each orthogonal, would have a largest singular value of up to 2.
    assert sv(d(16, 4096, optimizer=optimizer)).max() < 1.3


def test_a_matrix_of_more_than_1024_columns_is_not_cut():
    a_large_matrix_is_one_matrix(schatten.Muon)


def test_a_matrix_cut_into_blocks_is_caught():
    assert_caught(a_large_matrix_is_one_matrix, "large matrices are cut at 1024")


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_cuts_a_large_matrix(name):
    for X in (gaussian(12, 2100), gaussian(2100, 12)):
        assert sv(solver_of(name)(X)).max() < 1.3


def test_soap_beyond_its_largest_side_still_steps_one_matrix():
    # Beyond max_dim a side is not rotated; nothing is ever cut.
    for optimizer in (schatten.KLSOAP, schatten.SOAPMuon):
        p = P(4, 40)
        change = step(optimizer([p], lr=0.1, max_dim=16), p, gaussian(4, 40, seed=1))
        assert change.isfinite().all() and change.count_nonzero() == 160
        assert "max_dim=8192" in repr(optimizer([P(4, 4)]).state_dict()["param_groups"][0]["rule"])


def test_every_preset_pickles(any_preset):
    p = P(8, 8)
    opt = any_preset([p])
    step(opt, p, gaussian(8, 8))
    copy = pickle.loads(pickle.dumps(opt))
    assert type(copy) is any_preset
    (q,) = copy.param_groups[0]["params"]
    assert torch.equal(step(opt, p, gaussian(8, 8, seed=1)), step(copy, q, gaussian(8, 8, seed=1)))
