"""Weights of every spectrally bounded rule enter their ball at rate 1 - lr lambda, implicit decay 1 / (1 + lr lambda)."""

import pytest
import torch
from torch import nn

import schatten
from schatten import maps

SVD = schatten.solvers.svd()

LR, DECAY = 0.02, 0.8

OPTIONS = {"lr": LR, "weight_decay": DECAY}

# Every preset whose updates c D have spectral norm at most c, and how it says so. Scion's decay is 1.
BOUNDED = {
    "Muon": lambda p, decay: schatten.Muon(p, solver=SVD, decay=decay, **OPTIONS),
    "LionK": lambda p, decay: schatten.LionK(p, maps.Nuclear(SVD), decay=decay, **OPTIONS),
    "LionK Huber": lambda p, decay: schatten.LionK(p, maps.Huber(0.3, solver=SVD), decay=decay, **OPTIONS),
    "LionK KyFan": lambda p, decay: schatten.LionK(p, maps.KyFan(2), decay=decay, **OPTIONS),
    "LionK LogCosh": lambda p, decay: schatten.LionK(p, maps.LogCosh(0.3, solver=SVD), decay=decay, **OPTIONS),
    "Fanion": lambda p, decay: schatten.Fanion(p, 2, decay=decay, **OPTIONS),
    "Neon": lambda p, decay: schatten.Neon(p, decay=decay, **OPTIONS),
    "FMuon": lambda p, decay: schatten.FMuon(p, solver=SVD, decay=decay, **OPTIONS),
    "MARSM": lambda p, decay: schatten.MARSM(p, solver=SVD, decay=decay, **OPTIONS),
    "MuonMVR": lambda p, decay: schatten.MuonMVR(p, solver=SVD, decay=decay, **OPTIONS),
    "MuonEq": lambda p, decay: schatten.MuonEq(p, solver=SVD, decay=decay, **OPTIONS),
    "MuonPlusPlus": lambda p, decay: schatten.MuonPlusPlus(p, solver=SVD, decay=decay, **OPTIONS),
    "EF21Muon": lambda p, decay: schatten.EF21Muon(p, solver=SVD, decay=decay, **OPTIONS),
    "SOAPMuon": lambda p, decay: schatten.SOAPMuon(p, solver=SVD, decay=decay, **OPTIONS),
    "Dion2": lambda p, decay: schatten.Dion2(p, solver=SVD, decay=decay, **OPTIONS),
    "SpectralSGD 0": lambda p, decay: schatten.SpectralSGD(p, 0, solver=SVD, **OPTIONS),
    "SpectralAdam 0": lambda p, decay: schatten.SpectralAdam(p, 0, solver=SVD, **OPTIONS),
    "Scion": lambda p, decay: schatten.Scion(p, lr=LR * DECAY, radius=1 / DECAY, solver=SVD),
}

EXPLICIT_ONLY = ("SpectralSGD 0", "SpectralAdam 0", "Scion")

CASES = [
    (name, decay) for name in BOUNDED for decay in ("explicit", "implicit") if decay == "explicit" or name not in EXPLICIT_ONLY
]


@pytest.mark.parametrize(("name", "decay"), CASES)
def test_the_excess_over_the_ball_shrinks_at_least_at_the_rate(name, decay):
    generator = torch.Generator().manual_seed(0)
    W = nn.Parameter(30 * torch.randn(6, 4, generator=generator, dtype=torch.float64))
    opt = BOUNDED[name]([W], decay)
    group = opt.param_groups[0]
    scale = opt.rule(group).scale.factor(6, 4)
    radius = scale / DECAY
    rate = 1 - LR * DECAY if decay == "explicit" else 1 / (1 + LR * DECAY)
    excess = torch.linalg.matrix_norm(W.detach(), ord=2) - radius
    assert excess > 0
    for _ in range(400):
        W.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        opt.step()
        excess = rate * excess.clamp(min=0)
        # 1e-9 for rounding, and for the leading vectors that Krylov spaces leave orthogonal to it only.
        assert torch.linalg.matrix_norm(W.detach(), ord=2) <= radius + excess + 1e-9
    assert torch.linalg.matrix_norm(W.detach(), ord=2) <= radius * 1.05


def test_a_step_larger_than_the_decay_allows_is_warned_of_with_the_reason():
    with pytest.warns(UserWarning, match=r"lr \* weight_decay is 2: explicit decay .* hold for lr <= 1 / weight_decay"):
        schatten.Muon([nn.Parameter(torch.zeros(2, 2))], lr=4.0, weight_decay=0.5)
    schatten.Muon([nn.Parameter(torch.zeros(2, 2))], lr=4.0, weight_decay=0.5, decay="implicit")
    schatten.Muon([nn.Parameter(torch.zeros(2, 2))], lr=2.0, weight_decay=0.5)


@pytest.mark.parametrize(
    ("decay", "warns"),
    [
        (schatten.retractions.CautiousDecay(), True),
        (schatten.retractions.TiedDecay(), True),
        (schatten.retractions.TiedDecay(schatten.retractions.DecoupledDecay("implicit")), False),
        (schatten.retractions.CompositeStep(), False),
        (schatten.retractions.UpdateFloor(), False),
    ],
    ids=repr,
)
def test_only_explicit_decay_is_warned_of(decay, warns, recwarn):
    schatten.Muon([nn.Parameter(torch.zeros(2, 2))], lr=4.0, weight_decay=0.5, decay=decay)
    assert bool(len(recwarn)) == warns
