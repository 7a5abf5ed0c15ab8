"""torch.optim.Muon, alone and beside an AdamW, continues as ours: with one orthogonaliser, to rounding."""

import pytest
import torch
from torch import nn

import schatten
from tests.facts.converting import SOLVER, assert_same_next_steps, copies, parameters, polar, through_a_file, train

SHAPES = [(6, 4), (3, 5), (6, 4), (5,), (4,)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", polar)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [("original", "keller"), ("match_rms_adamw", "adamw-rms")])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_torch_muon_continues_as_ours(theirs, ours, nesterov, form, dtype, tmp_path):
    params = parameters(SHAPES[:3], dtype)
    muon = torch.optim.Muon(params, lr=0.03, weight_decay=0.2, momentum=0.9, adjust_lr_fn=theirs, nesterov=nesterov)
    train(muon, params, range(4))
    own = copies(params)
    opt = schatten.Muon(own, scale=ours, nesterov=nesterov, form=form, solver=SOLVER)
    opt.load_state_dict(through_a_file(muon.state_dict(), tmp_path))
    assert_same_next_steps(muon, params, opt, own, 1e-12 if dtype == torch.float64 else 1e-4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.double()


@pytest.mark.parametrize("named", [True, False], ids=["names in the file", "names given"])
def test_torch_muon_and_the_adamw_beside_it_continue_as_one(named, tmp_path):
    model = Net()
    everything = dict(model.named_parameters())
    matrices = {n: p for n, p in everything.items() if n in ("second.weight", "first.weight")}
    rest = {n: p for n, p in everything.items() if n not in matrices}
    of = (lambda some: list(some.items())) if named else (lambda some: list(some.values()))
    muon = torch.optim.Muon(of(matrices), lr=0.03, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(of(rest), lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    params = list(everything.values())
    both = [muon, adamw]

    class Both:
        def step(self):
            for opt in both:
                opt.step()

    train(Both(), params, range(4))
    twin = Net()
    twin.load_state_dict(model.state_dict())
    opt = schatten.Muon(twin, solver=SOLVER)
    names = None if named else [*matrices, *rest]
    saved, beside = (through_a_file(o.state_dict(), tmp_path) for o in both)
    opt.load_state_dict(schatten.converters.from_torch_muon(saved, opt, names, adamw=beside))
    assert opt.param_groups[1]["lr"] == 0.02 and opt.param_groups[1]["betas"] == (0.8, 0.9)
    assert_same_next_steps(Both(), params, opt, list(twin.parameters()))


def test_the_adamw_beside_it_is_asked_for():
    model = Net()
    muon = torch.optim.Muon([("first.weight", model.first.weight), ("second.weight", model.second.weight)])
    opt = schatten.Muon(model, scale="keller")
    with pytest.raises(ValueError, match=r"'embedding.weight' is not in it"):
        opt.load_state_dict(muon.state_dict())


def test_a_schedulers_initial_lr_comes_along():
    params = parameters(SHAPES[:1])
    muon = torch.optim.Muon(params, lr=0.03)
    torch.optim.lr_scheduler.LambdaLR(muon, lambda step: 0.5)
    opt = schatten.Muon(copies(params), scale="keller")
    opt.load_state_dict(muon.state_dict())
    assert opt.param_groups[0]["initial_lr"] == 0.03 and opt.param_groups[0]["lr"] == 0.015
