"""What the optimizers that balance rows, columns, entries or norms refuse, at construction and in words."""

import pytest
import torch
from torch import nn

from schatten.presets.hyperball import Hyperball
from schatten.presets.muon_eq import Equilibrated, MuonEq
from schatten.presets.muon_plus import MuonPlus, Normalised
from schatten.presets.normuon import NorMuon


def matrix(*shape):
    return nn.Parameter(torch.randn(*(shape or (6, 4))))


@pytest.mark.parametrize("construct", [lambda form: MuonEq([matrix()], form=form), Equilibrated], ids=["preset", "slot"])
def test_muon_eq_refuses_another_form(construct):
    with pytest.raises(ValueError, match="form must be one of 'rows', 'columns', 'both', got 'rowcol'"):
        construct("rowcol")


@pytest.mark.parametrize("construct", [lambda norm: MuonPlus([matrix()], norm=norm), Normalised], ids=["preset", "slot"])
def test_muon_plus_refuses_another_norm(construct):
    with pytest.raises(ValueError, match="norm must be one of 'row', 'col', 'col_row', 'row_col', got 'none'"):
        construct("none")


@pytest.mark.parametrize("eps", [0.0, -1e-7, float("inf"), float("nan")])
def test_muon_plus_refuses_an_eps_that_divides_by_zero_or_by_infinity(eps):
    with pytest.raises(ValueError, match="eps must be finite and > 0"):
        Normalised(eps=eps)


@pytest.mark.parametrize("beta2", [1.0, -0.1])
def test_normuon_refuses_a_decay_of_its_second_moment_outside_its_range(beta2):
    with pytest.raises(ValueError, match=r"beta2 must lie in \[0, 1\)"):
        NorMuon([matrix()], beta2=beta2)


def test_hyperball_refuses_weight_decay_of_matrices_everywhere():
    words = "weight_decay must be 0 for matrices, whose norm Hyperball fixes, got 0.1"
    for construct in (
        lambda: Hyperball([matrix()], weight_decay=0.1),
        lambda: Hyperball([{"params": [matrix()], "weight_decay": 0.1}]),
        lambda: Hyperball(nn.Linear(4, 4), weight_decay=0.1),
    ):
        with pytest.raises(ValueError, match=words):
            construct()
    opt = Hyperball([first := matrix()])
    with pytest.raises(ValueError, match=words):
        opt.add_param_group({"params": [matrix()], "weight_decay": 0.1})
    assert len(opt.param_groups) == 1 and set(opt.state) == {first}


def test_hyperball_leaves_adamw_groups_their_decay():
    opt = Hyperball([{"params": [matrix()]}, {"params": [matrix(5)], "algorithm": "adamw", "weight_decay": 0.1}])
    assert [group["weight_decay"] for group in opt.param_groups] == [0.0, 0.1]
