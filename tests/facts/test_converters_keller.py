"""Keller Jordan's Muon, of the package muon-optimizer, continues as ours: with one orthogonaliser, to rounding."""

import copy

import pytest
import torch
from torch import nn

import schatten
from tests.facts.converting import SOLVER, assert_same_next_steps, copies, parameters, polar, through_a_file, train

muon = pytest.importorskip("muon", reason="Keller Jordan's Muon: pip install muon-optimizer==0.1.0")

SHAPES = [(4, 6), (6, 4), (3, 5), (8, 4, 3, 3), (2, 6, 4), (5,), (7, 4)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(muon, "zeropower_via_newtonschulz5", polar)
    # The package fails on convolutions; the repository's later version has this reshape.
    update = muon.muon_update
    monkeypatch.setattr(muon, "muon_update", lambda grad, *args, **kwargs: update(grad, *args, **kwargs).reshape(grad.shape))
    # Its classes for several devices ask torch.distributed, which one process need not start.
    monkeypatch.setattr(muon.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(muon.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(muon.dist, "all_gather", lambda outputs, given: None)


def test_single_device_muon_continues_as_ours(tmp_path):
    params = parameters(SHAPES[:3])
    theirs = muon.SingleDeviceMuon(params, lr=0.03, weight_decay=0.2, momentum=0.9)
    train(theirs, params, range(4))
    own = copies(params)
    opt = schatten.Muon(own, scale="keller", solver=SOLVER)
    opt.load_state_dict(schatten.converters.from_keller(through_a_file(theirs.state_dict(), tmp_path), opt))
    assert_same_next_steps(theirs, params, opt, own)


@pytest.mark.parametrize("kind", [muon.MuonWithAuxAdam, muon.SingleDeviceMuonWithAuxAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_muon_with_its_adam_continues_as_ours(kind, form, tmp_path):
    named = {f"p{i}": p for i, p in enumerate(parameters(SHAPES))}
    hidden, rest = [f"p{i}" for i in range(5)], ["p5", "p6"]
    theirs = kind(
        [
            {"params": [named[n] for n in rest], "lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3, "use_muon": False},
            {"params": [named[n] for n in hidden], "lr": 0.03, "momentum": 0.9, "weight_decay": 0.2, "use_muon": True},
        ]
    )
    params = list(named.values())
    train(theirs, params, range(4))
    own = dict(zip(named, copies(params), strict=True))
    opt = schatten.Muon(
        [
            {"params": [(n, own[n]) for n in hidden[:4]]},
            {"params": [("p4", own["p4"])], "layout": "experts"},
            {"params": [(n, own[n]) for n in rest], "algorithm": "adamw"},
        ],
        scale="keller",
        form=form,
        solver=SOLVER,
    )
    # MuonWithAuxAdam has sorted the matrices, so its order is read from it.
    name_of = {p: n for n, p in named.items()}
    names = [name_of[p] for group in theirs.param_groups for p in group["params"]]
    saved = through_a_file(theirs.state_dict(), tmp_path)
    opt.load_state_dict(schatten.converters.from_keller(saved, opt, names))
    assert_same_next_steps(theirs, params, opt, list(own.values()))


def test_a_convolution_whose_factor_is_another_is_refused_and_fits_without_one(tmp_path):
    # Keller's factor is of the kernel's height and width, 1; that of the matrix it flattens to is sqrt(32 / 27).
    params = parameters([(32, 3, 3, 3)])
    theirs = muon.SingleDeviceMuon(params, lr=0.03)
    train(theirs, params, range(4))
    own = copies(params)
    saved = through_a_file(theirs.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r'lr \* 1 U V\^T there and lr \* 1.08866 U V\^T here: put it .* scale="none"'):
        schatten.converters.from_keller(saved, schatten.Muon(own, scale="keller"))
    opt = schatten.Muon(own, scale="none", solver=SOLVER)
    opt.load_state_dict(schatten.converters.from_keller(saved, opt))
    assert_same_next_steps(theirs, params, opt, own)


def test_another_scale_or_layout_is_refused_with_the_one_that_fits():
    params = parameters([(6, 4), (2, 6, 4)])
    theirs = muon.SingleDeviceMuon(params, lr=0.03)
    train(theirs, params, range(1))
    with pytest.raises(ValueError, match=r"build schatten\.Muon with scale='keller'"):
        schatten.converters.from_keller(theirs.state_dict(), schatten.Muon([{"params": copies(params), "layout": "experts"}]))
    conv = [{"params": copies(params[:1])}, {"params": copies(params[1:]), "layout": "conv"}]
    both = muon.SingleDeviceMuon([{"params": params[:1]}, {"params": params[1:]}])
    train(both, params, range(1))
    with pytest.raises(ValueError, match="by the layout 'conv' here and by 'experts' there"):
        schatten.converters.from_keller(both.state_dict(), schatten.Muon(conv, scale="keller"))


def test_the_file_of_one_of_two_ranks_is_refused_and_the_ranks_files_together_load(monkeypatch):
    # Each rank keeps the momentum of every second matrix.
    shapes = [(6, 4)] * 4
    whole = parameters(shapes)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(muon.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(muon.dist, "get_rank", lambda rank=rank: rank)
        theirs = muon.Muon(copies(whole), lr=0.03)
        train(theirs, [p for g in theirs.param_groups for p in g["params"]], range(2))
        ranks.append(theirs.state_dict())
    a, b = ranks
    assert sorted(a["state"]) == [0, 2] and sorted(b["state"]) == [1, 3]
    opt = schatten.Muon(copies(whole), scale="keller")
    with pytest.raises(ValueError, match=r"2 of 4 matrices have no momentum\.\nEach rank"):
        schatten.converters.from_keller(a, opt)
    together = {"state": {**a["state"], **b["state"]}, "param_groups": a["param_groups"]}
    opt.load_state_dict(schatten.converters.from_keller(together, opt))
    assert all(s["momentum_buffer"].count_nonzero() for s in opt.state_dict()["state"].values())


def test_sgds_state_is_no_kellers():
    p = nn.Parameter(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"no checkpoint of Keller Jordan's Muon.*dampening"):
        schatten.converters.from_keller(torch.optim.SGD([p], momentum=0.9).state_dict(), schatten.Muon([p]))


def test_muon_and_the_adamw_beside_it_continue_as_one():
    matrix, vector = parameters([(6, 4), (5,)])
    theirs, adamw = muon.SingleDeviceMuon([matrix], lr=0.03), torch.optim.AdamW([vector], lr=0.02)

    class Both:
        def step(self):
            theirs.step()
            adamw.step()

    train(Both(), [matrix, vector], range(4))
    own = copies([matrix, vector])
    opt = schatten.Muon([{"params": own[:1]}, {"params": own[1:], "algorithm": "adamw"}], scale="keller", solver=SOLVER)
    saved = copy.deepcopy(theirs.state_dict())
    opt.load_state_dict(schatten.converters.from_keller(saved, opt, adamw=adamw.state_dict()))
    assert_same_next_steps(Both(), [matrix, vector], opt, own)
