"""Moonlight's Muon continues as ours: a slow twin of its equations writes the dictionaries."""

import math

import pytest
import torch
from torch import nn

import schatten
from tests.facts.converting import SOLVER, assert_same_next_steps, copies, parameters, polar, through_a_file, train

GROUP = {"lr": 0.02, "wd": 0.2, "momentum": 0.9, "nesterov": True, "ns_steps": 5}

GROUP |= {"adamw_betas": (0.8, 0.9), "adamw_eps": 1e-8}


class Twin(torch.optim.Optimizer):
    """Moonlight's Muon: M is a sum, one lr for both methods, each parameter's state says which."""

    def __init__(self, muon, adamw, **options):
        super().__init__([*muon, *adamw], {**GROUP, **options})
        for p in (*muon, *adamw):
            self.state[p]["use_muon"] = any(p is q for q in muon)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            state, G, lr = self.state[p], p.grad, group["lr"]
            p.mul_(1 - lr * group["wd"])
            if state["use_muon"]:
                M = state.setdefault("momentum_buffer", torch.zeros_like(p))
                M.copy_(group["momentum"] * M + G)
                U = polar(G + group["momentum"] * M if group["nesterov"] else M)
                p.sub_(lr * 0.2 * math.sqrt(max(p.shape)) * U)
            else:
                state["step"] = state.get("step", 0) + 1
                M, V = (state.setdefault(key, torch.zeros_like(p)) for key in ("moment1", "moment2"))
                b1, b2 = group["adamw_betas"]
                M.copy_(b1 * M + (1 - b1) * G)
                V.copy_(b2 * V + (1 - b2) * G**2)
                corrected = (1 - b1 ** state["step"]) / (1 - b2 ** state["step"]) ** 0.5
                p.sub_(lr / corrected * M / (group["adamw_eps"] + V.sqrt()))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_moonlights_muon_continues_as_ours(nesterov, form, tmp_path):
    params = parameters([(6, 4), (3, 5), (7, 4), (5,)])
    theirs = Twin(params[:2], params[2:], nesterov=nesterov)
    train(theirs, params, range(4))
    own = copies(params)
    opt = schatten.Muon(
        [
            {"params": list(zip("cd", own[2:], strict=True)), "algorithm": "adamw"},
            {"params": list(zip("ab", own[:2], strict=True))},
        ],
        nesterov=nesterov,
        form=form,
        solver=SOLVER,
    )
    saved = through_a_file(theirs.state_dict(), tmp_path)
    opt.load_state_dict(schatten.converters.from_moonlight(saved, opt, list("abcd")))
    assert opt.param_groups[0]["lr"] == opt.param_groups[1]["lr"] == 0.02
    # eps is added before the bias is corrected there and after it here: 1e-8 of the smallest gradient's root of V.
    assert_same_next_steps(theirs, params, opt, own, 1e-5)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "use_muon"),
        ({"use_muon": 1}, "use_muon True or False"),
        ({"use_muon": False}, "was trained by AdamW"),
        ({"use_muon": True, "momentum_buffer": torch.zeros(4, 6)}, "has shape (4, 6), not (6, 4)"),
        ({"use_muon": True, "momentum_buffer": "x"}, "is no tensor of real numbers"),
        ({"use_muon": True, "momentum_buffer": torch.full((6, 4), float("inf"))}, "inf or nan"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(state, words):
    saved = {"state": {0: state}, "param_groups": [{**GROUP, "params": [0]}]}
    with pytest.raises(ValueError) as caught:
        schatten.converters.from_moonlight(saved, schatten.Muon([nn.Parameter(torch.zeros(6, 4))]))
    assert words in str(caught.value)


def test_another_scale_is_refused_with_the_one_that_fits():
    saved = {"state": {0: {"use_muon": True}}, "param_groups": [{**GROUP, "params": [0]}]}
    with pytest.raises(ValueError, match="scale='adamw-rms', nesterov=True"):
        schatten.converters.from_moonlight(saved, schatten.Muon([nn.Parameter(torch.zeros(6, 4))], scale="keller"))
