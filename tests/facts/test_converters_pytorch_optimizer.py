"""pytorch_optimizer's Muon continues as ours: with one orthogonaliser, to rounding."""

import pytest

import schatten
from tests.facts.converting import SOLVER, assert_same_next_steps, copies, parameters, polar, through_a_file, train

base = pytest.importorskip("pytorch_optimizer.optimizer.muon.base", reason="pip install pytorch-optimizer")

from pytorch_optimizer import Muon  # noqa: E402

SHAPES = [(4, 6), (6, 4), (32, 3, 3, 3), (8, 4, 3), (5,), (7, 4)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(base, "zero_power_via_newton_schulz_5", polar)


def trained(**options):
    params = parameters(SHAPES)
    groups = [
        {"params": params[4:], "lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3, "use_muon": False},
        {"params": params[:4], "lr": 0.03, "momentum": 0.9, "weight_decay": 0.2, "use_muon": True},
    ]
    theirs = Muon(groups, **options)
    train(theirs, params, range(4))
    return theirs, params


def ours(own, **options):
    groups = [{"params": own[4:], "algorithm": "adamw"}, {"params": own[:4], "layout": "auto"}]
    groups[1:] = [{"params": own[:2]}, {"params": own[2:4], "layout": "conv"}]
    names = [[("e", own[4]), ("f", own[5])], [("a", own[0]), ("b", own[1])], [("c", own[2]), ("d", own[3])]]
    return schatten.Muon([{**g, "params": n} for g, n in zip(groups, names, strict=True)], solver=SOLVER, **options)


@pytest.mark.parametrize("adjusted", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_pytorch_optimizers_muon_continues_as_ours(adjusted, nesterov, tmp_path):
    theirs, params = trained(use_adjusted_lr=adjusted, nesterov=nesterov)
    own = copies(params)
    opt = ours(own, scale="adamw-rms" if adjusted else "keller", nesterov=nesterov)
    saved = through_a_file(theirs.state_dict(), tmp_path)
    opt.load_state_dict(schatten.converters.from_pytorch_optimizer(saved, opt, ["e", "f", "a", "b", "c", "d"]))
    assert_same_next_steps(theirs, params, opt, own)


def test_decay_in_the_gradient_is_refused():
    theirs, params = trained(weight_decouple=False)
    with pytest.raises(ValueError, match="only weight_decouple True"):
        schatten.converters.from_pytorch_optimizer(theirs.state_dict(), ours(copies(params)), list("efabcd"))


def test_another_scale_is_refused_with_the_one_that_fits():
    theirs, params = trained(use_adjusted_lr=True)
    with pytest.raises(ValueError, match="scale='adamw-rms'"):
        schatten.converters.from_pytorch_optimizer(theirs.state_dict(), ours(copies(params), scale="mup"), list("efabcd"))
