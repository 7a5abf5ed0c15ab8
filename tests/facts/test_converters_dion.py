"""Muon and NorMuon of microsoft/dion continue as ours: slow twins of their equations write the dictionaries."""

import math

import pytest
import torch
from torch import nn

import schatten
from tests.facts.converting import SOLVER, assert_same_next_steps, copies, parameters, polar, through_a_file, train

FACTORS = {
    "spectral_norm": lambda m, n: math.sqrt(m / n),
    "rms_norm": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    None: lambda m, n: 1.0,
}

OURS = {"spectral_norm": "mup", "rms_norm": "adamw-rms", None: "none"}

GROUP = {"mu": 0.9, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.2, "step": 0, "epsilon": 1e-8, "nesterov": False}

MUON = {**GROUP, "lr": 0.03, "algorithm": "muon", "flatten": False, "adjust_lr": "spectral_norm", "cautious_wd": False}


class Twin(torch.optim.Optimizer):
    """One device's share of Dion's Muon and NorMuon: M is a sum, AdamW counts the steps of its group."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                (self.adamw if group["algorithm"] == "adamw" else self.matrix)(p, self.state[p], group)

    def adamw(self, p, state, group):
        M, V = (state.setdefault(key, torch.zeros_like(p)) for key in ("momentum", "variance"))
        b1, b2, t = group["beta1"], group["beta2"], group["step"]
        M.copy_(b1 * M + (1 - b1) * p.grad)
        V.copy_(b2 * V + (1 - b2) * p.grad**2)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (M / (1 - b1**t)) / ((V / (1 - b2**t)).sqrt() + group["epsilon"]))

    def matrix(self, p, state, group):
        M = state.setdefault("momentum", torch.zeros_like(p))
        M.copy_(group["mu"] * M + p.grad)
        S = p.grad + group["mu"] * M if group["nesterov"] else M
        S = S.flatten(1) if group["flatten"] else S
        heads = group.get("num_heads") or 1
        sizes = group.get("split_sizes") or [S.shape[-2] // heads] * heads
        if group["algorithm"] == "normuon":
            shape = (len(p), *[1] * (p.ndim - 1)) if group["flatten"] else (*p.shape[:-1], 1)
            V = state.setdefault("variance_neuron", torch.zeros(shape, dtype=p.dtype)).view(*S.shape[:-1], 1)
        else:
            V = torch.zeros(*S.shape[:-1], 1)
        parts = [self.direction(G, v, group) for G, v in zip(S.split(sizes, -2), V.split(sizes, -2), strict=True)]
        U = torch.cat(parts, -2).view(p.shape)
        decay = group["lr"] * group["weight_decay"]
        p.sub_(decay * torch.where(p * U > 0, p, 0.0) if group["cautious_wd"] else decay * p)
        p.sub_(group["lr"] * U)

    def direction(self, G, v, group):
        D = polar(G)
        if group["algorithm"] == "normuon":
            size, beta = D.norm(dim=(-2, -1), keepdim=True), group["muon_beta2"]
            v.copy_(beta * v + (1 - beta) * (D**2).mean(-1, keepdim=True))
            D = D / (v.sqrt() + 1e-8)
            D = D * size / D.norm(dim=(-2, -1), keepdim=True)
        return D * FACTORS[group["adjust_lr"]](*G.shape[-2:])


def assert_continues(groups, build, tmp_path, names=None):
    theirs = Twin(groups)
    params = [p for group in theirs.param_groups for p in group["params"]]
    train(theirs, params, range(4))
    own = copies(params)
    opt = build(own)
    opt.load_state_dict(schatten.converters.from_dion(through_a_file(theirs.state_dict(), tmp_path), opt, names))
    assert_same_next_steps(theirs, params, opt, own, 1e-6 if groups[0]["algorithm"] == "normuon" else 1e-12)


@pytest.mark.parametrize("adjust_lr", list(FACTORS), ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_dions_muon_and_its_adamw_continue_as_ours(adjust_lr, nesterov, form, tmp_path):
    params = parameters([(6, 4), (3, 5), (2, 6, 4), (5,)])
    groups = [
        {**MUON, "adjust_lr": adjust_lr, "nesterov": nesterov, "params": params[:3]},
        {**MUON, "algorithm": "adamw", "lr": 0.02, "params": params[3:]},
    ]

    def build(own):
        named = dict(zip("abcd", own, strict=True))
        return schatten.Muon(
            [
                {"params": [("d", named["d"])], "algorithm": "adamw"},
                {"params": [("a", named["a"]), ("b", named["b"])]},
                {"params": [("c", named["c"])], "layout": "experts"},
            ],
            nesterov=nesterov,
            scale=OURS[adjust_lr],
            form=form,
            solver=SOLVER,
        )

    assert_continues(groups, build, tmp_path, list("abcd"))


CUTS = {
    "heads": ({"num_heads": 2}, {"layout": schatten.Layout(heads=2)}),
    "split": ({"split_sizes": (4, 2)}, {"layout": schatten.Layout(split=(4, 2))}),
    "equal parts, said otherwise": ({"split_sizes": (2, 2, 2)}, {"layout": schatten.Layout("matrix", split=3)}),
    "cautious": ({"cautious_wd": True}, {"decay": "cautious"}),
}


@pytest.mark.parametrize(("theirs", "ours"), CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("preset", [schatten.Muon, schatten.NorMuon])
def test_cut_matrices_and_cautious_decay_continue_as_ours(preset, theirs, ours, tmp_path):
    norm = {"algorithm": "normuon", "muon_beta2": 0.8} if preset is schatten.NorMuon else {}
    group = {k: v for k, v in ours.items() if k == "layout"}
    options = {"scale": "mup", "nesterov": False, "solver": SOLVER, **{k: v for k, v in ours.items() if k == "decay"}}
    assert_continues(
        [{**MUON, **norm, **theirs, "params": parameters([(6, 4), (6, 9)])}],
        lambda own: preset([{"params": own, **group}], **options),
        tmp_path,
    )


@pytest.mark.parametrize("preset", [schatten.Muon, schatten.NorMuon])
@pytest.mark.parametrize("flatten", [True, False])
def test_flattened_and_stacked_tensors_continue_as_ours(preset, flatten, tmp_path):
    norm = {"algorithm": "normuon", "muon_beta2": 0.8} if preset is schatten.NorMuon else {}
    assert_continues(
        [{**MUON, **norm, "flatten": flatten, "params": parameters([(6, 2, 3, 3), (4, 6, 5)])}],
        lambda own: preset(
            [{"params": own, "layout": "conv" if flatten else "experts"}], scale="mup", nesterov=False, solver=SOLVER
        ),
        tmp_path,
    )


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"algorithm": "lion"}, "only algorithm 'muon' or 'normuon' or 'adamw'"),
        ({"algorithm": "dion2"}, "only algorithm"),
        ({"adjust_lr": "rms_norm"}, "scale='adamw-rms'"),
        ({"nesterov": True}, "nesterov=True"),
        ({"cautious_wd": True}, "decay='cautious'"),
        ({"algorithm": "normuon", "muon_beta2": 0.9}, "build schatten.NorMuon"),
        ({"num_heads": 2}, "by the layout 'matrix' here and by \"Layout('matrix', heads=2)\" there"),
        ({"split_sizes": (4, 4)}, "adds up to 8"),
        ({"algorithm": "adamw"}, 'was trained by AdamW, here by a rule: route it to "adamw"'),
        ({"algorithm": "adamw", "cautious_wd": True}, "cautious_wd False"),
        ({"mu": 1.5}, "momentum is 1.5"),
        ({"mu": None}, "momentum is None"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_what_would(group, words):
    state = {"momentum": torch.zeros(6, 4), "variance": torch.zeros(6, 4), "variance_neuron": torch.zeros(6, 1)}
    saved = {"state": {0: state}, "param_groups": [{**MUON, **group, "params": [0]}]}
    opt = schatten.Muon([nn.Parameter(torch.zeros(6, 4))], scale="mup", nesterov=False)
    with pytest.raises(ValueError) as caught:
        schatten.converters.from_dion(saved, opt)
    assert words in str(caught.value)


def test_state_without_all_that_a_method_keeps_is_refused():
    saved = {"state": {0: {"momentum": torch.zeros(6, 4)}}, "param_groups": [{**MUON, "muon_beta2": 0.9, "params": [0]}]}
    saved["param_groups"][0]["algorithm"] = "normuon"
    opt = schatten.NorMuon([nn.Parameter(torch.zeros(6, 4))], scale="mup", nesterov=False)
    with pytest.raises(ValueError, match="the state of a parameter has no variance_neuron, only momentum"):
        schatten.converters.from_dion(saved, opt)


def test_a_group_without_dions_keys_is_refused_by_those():
    saved = {"state": {}, "param_groups": [{"algorithm": "muon", "lr": 0.1, "params": [0]}]}
    with pytest.raises(ValueError, match=r"no checkpoint of Dion's Muon: a group has no nesterov"):
        schatten.converters.from_dion(saved, schatten.Muon([nn.Parameter(torch.zeros(6, 4))]))
