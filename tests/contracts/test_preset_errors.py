"""What presets refuse at construction: the parameter is named, with what was given."""

import pytest
import torch
from torch import nn

import schatten
from schatten import maps, solvers


def matrix():
    return nn.Parameter(torch.zeros(4, 3))


CASES = {
    "an unknown option": (lambda: schatten.NorMuon([matrix()], learning_rate=0.1), r"got \['learning_rate'\]"),
    "an exponent above 1": (lambda: schatten.SpectralSGD([matrix()], p=2), r"p must be a number in \[-0.9, 1\], got 2"),
    "an exponent as text": (lambda: schatten.SpectralAdam([matrix()], p="1/2"), r"p must be a number .* got '1/2'"),
    "another normalisation": (
        lambda: schatten.SpectralSGD([matrix()], normalize="RMS"),
        "normalize must be None .* got \"?'RMS",
    ),
    "a polar solver for a power": (
        lambda: schatten.SpectralSGD([matrix()], p=0.5, solver=solvers.polynomial()),
        r"solver must compute U S\^0.5 V\^T, as schatten.solvers.tower\(\)",
    ),
    "a map as text": (lambda: schatten.LionK([matrix()], "nuclear"), "map must be a map of schatten.maps, got 'nuclear'"),
    "a map's class": (lambda: schatten.LionK([matrix()], maps.L1), r"got the class L1: write L1\(...\)"),
    "another form": (lambda: schatten.LionK([matrix()], form="web"), "form must be 'paper' .* got 'web'"),
    "no direction": (lambda: schatten.Fanion([matrix()], count=0), "count >= 1 of singular values, got count=0"),
    "a mixture that is none": (
        lambda: schatten.FMuon([matrix()], alpha=1),
        r"alpha must lie in \(0, 1\), got 1; for 1 use Muon",
    ),
    "no sign part": (lambda: schatten.SMuon([matrix()], eta_s=0), r"eta_s must lie in \(0, inf\), got 0; without .* use Muon"),
    "a correction above 1": (lambda: schatten.MuonMVR([matrix()], gamma=2), r"gamma must lie in \[0, 1\] .* got 2"),
    "another ball": (
        lambda: schatten.Scion([{"params": [matrix()], "ball": "cube"}]),
        "ball must be one of 'spectral', 'sign'",
    ),
    "a negative radius": (lambda: schatten.Scion([matrix()], radius=-1), r"radius must be a number in \(0, inf\), got -1"),
    "an empty block": (lambda: schatten.JaguarMuon([matrix()], share=0), r"share must be a number in \(0, 1\], got 0"),
    "no difference": (lambda: schatten.JaguarMuon([matrix()], eps="x"), r"eps must be a number in .* got 'x'"),
    "a vector": (lambda: schatten.NorMuon([nn.Parameter(torch.zeros(3))]), r"params\[0\] has shape \(3,\)"),
    "a beta of 1": (lambda: schatten.NorMuon([matrix()], beta2=1.0), r"beta2 must lie in \[0, 1\), got 1.0"),
    "one beta": (lambda: schatten.Lion([matrix()], betas=(0.9,)), r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    "a negative eps": (lambda: schatten.SpectralAdam([matrix()], eps=-1), "eps must be finite and >= 0, got -1"),
    "a target of 0": (lambda: schatten.scales.RMS(0), r"target must lie in \(0, inf\), got 0"),
    "a list to initialise": (lambda: schatten.init_spectral_([matrix()]), "torch.nn.Module, got list"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case):
    construct, words = CASES[case]
    with pytest.raises((TypeError, ValueError), match=words):
        construct()


def test_previous_weights_are_for_mvr2():
    with (
        pytest.raises(RuntimeError, match="build the optimizer with exact=True"),
        schatten.MuonMVR([matrix()]).previous_weights(),
    ):
        pass


def test_mvr2_refuses_a_step_without_its_second_gradient_and_changes_nothing():
    W = matrix()
    opt = schatten.MuonMVR([W], exact=True)
    W.grad = torch.ones(4, 3)
    opt.step()  # the first has no previous weights
    before = W.detach().clone()
    with pytest.raises(RuntimeError, match=r"gradient at the previous weights too: pass a closure to step\(\)"):
        opt.step()
    assert torch.equal(W, before)


def test_previous_weights_come_back_when_the_evaluation_fails():
    W = nn.Parameter(torch.randn(4, 3))
    opt = schatten.MuonMVR([W], exact=True)
    W.grad = torch.ones(4, 3)
    opt.step()
    weight, grad = W.detach().clone(), W.grad
    with pytest.raises(ZeroDivisionError), opt.previous_weights():
        assert not torch.equal(W, weight) and W.grad is None
        raise ZeroDivisionError
    assert torch.equal(W, weight) and W.grad is grad
    with pytest.raises(RuntimeError, match="previous weights"):
        opt.step()


@pytest.mark.parametrize(
    ("signal", "preset"),
    [
        (schatten.signals.VarianceReduced(exact=True), "MuonMVR"),
        (schatten.signals.ErrorFeedback(workers=2), "EF21Muon"),
        (schatten.presets.jaguar_muon.BlockMomentum(), "JaguarMuon"),
    ],
)
def test_a_signal_that_a_preset_feeds_is_refused_elsewhere_instead_of_reading_zeros(signal, preset):
    with pytest.raises(ValueError, match=rf"reads what {preset} evaluates for it: build {preset}\("):
        schatten.SpectralOptimizer([matrix()], schatten.Rule(signal), momentum=0.9)


def test_mvr_groups_are_evaluated_alike():
    rule = schatten.Rule(schatten.signals.VarianceReduced(exact=True))
    with pytest.raises(ValueError, match="all groups are evaluated alike, with exact=False"):
        schatten.MuonMVR([{"params": [matrix()], "rule": rule}])


def test_only_mvr2_keeps_a_copy_of_the_weights():
    params = [{"params": [matrix()]}, {"params": [nn.Parameter(torch.zeros(3))], "algorithm": "adamw"}]
    for exact in (False, True):
        opt = schatten.MuonMVR([dict(group) for group in params], exact=exact)
        assert ["previous_weight" in state for state in opt.state.values()] == [exact, exact]


def test_a_gradient_that_is_not_finite_at_the_previous_weights_skips_its_matrix_only():
    params = [matrix(), matrix()]
    opt = schatten.MuonMVR(params, exact=True)
    for step in range(3):
        with opt.previous_weights():
            for p in params:
                p.grad = torch.ones(4, 3)
            if step == 1:
                params[0].grad[0, 0] = float("inf")
        for p in params:
            p.grad = torch.ones(4, 3)
        opt.step()
    assert opt.metrics()["skipped"] == {"0.0": 1}
    assert all(p.isfinite().all() for p in params)
    assert all(opt.state[p]["momentum_buffer"].isfinite().all() for p in params)


def test_what_a_sample_did_not_use_at_the_previous_weights_had_gradient_zero_there():
    p = matrix()
    opt = schatten.MuonMVR([p], exact=True)
    p.grad = torch.ones(4, 3)
    opt.step()
    with opt.previous_weights():
        p.grad = torch.ones(4, 3)
    with opt.previous_weights():
        pass
    assert opt.state[p]["previous_gradient"].count_nonzero() == 0
