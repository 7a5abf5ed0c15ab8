"""Metrics: measured numbers equal what SVD and differences of weights say, and cost nothing on the steps between."""

import copy
import math

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, solvers
from schatten.metrics import ITERATIONS, orthogonality_error, spectral_norm
from tests.contracts.driving import step


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.LayerNorm(8))


def with_gradients(net):
    for p in net.parameters():
        p.grad = torch.randn_like(p)


def test_every_n_th_call_returns_numbers_and_the_others_none():
    net = model()
    opt = schatten.Muon(net)
    returned = []
    for _ in range(9):
        with_gradients(net)
        opt.step()
        returned.append(opt.metrics(every=3))
    assert [m is not None for m in returned] == [False, False, True] * 3
    assert [m["measured_step"] for m in returned if m] == [3, 6, 9]


@pytest.mark.parametrize("every", [0, -1, True, 2.0, "3"])
def test_every_must_be_a_positive_number_of_steps(every):
    with pytest.raises(ValueError, match="every must be a positive number of steps, got"):
        schatten.Muon(model()).metrics(every=every)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_update_rms_is_that_of_the_change_without_decay(decay):
    net = model()
    opt = schatten.Muon(net, lr=0.01, weight_decay=decay, adamw={"lr": 0.003})
    for _ in range(2):
        before = [p.detach().clone() for p in net.parameters()]
        with_gradients(net)
        opt.step()
        measured = opt.metrics(every=1)
    names = [name for name, _ in net.named_parameters()]
    lr = {name: 0.01 if name in ("1.weight", "3.weight") else 0.003 for name in names}
    for name, p, old in zip(names, net.parameters(), before, strict=True):
        change = p.detach() - (1 - lr[name] * decay) * old
        # Differences of fp32 weights of size 1 know an update of 1e-3 to some 1e-4 of itself.
        assert measured["update_rms"][name] == pytest.approx(float(change.square().mean().sqrt()), rel=1e-3)
    for route, group in (
        ("spectral", ("1.weight", "3.weight")),
        ("adamw", [n for n in names if n not in ("1.weight", "3.weight")]),
    ):
        gradients = [p.grad.square().sum() for name, p in net.named_parameters() if name in group]
        weights = [p.detach().square().sum() for name, p in net.named_parameters() if name in group]
        assert measured["norms"][route]["gradient"] == pytest.approx(math.sqrt(sum(gradients)), rel=1e-5)
        assert measured["norms"][route]["weight"] == pytest.approx(math.sqrt(sum(weights)), rel=1e-5)
        squares = [measured["update_rms"][n] ** 2 * p.numel() for n, p in net.named_parameters() if n in group]
        assert measured["norms"][route]["update"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


def test_the_orthogonality_error_is_zero_for_the_exact_solver_and_what_the_spectrum_says_for_one_newton_schulz_step():
    errors = {}
    for name, solver in (("exact", solvers.svd()), ("one step", solvers.newton_schulz(steps=1))):
        W = nn.Parameter(torch.zeros(12, 6))
        opt = schatten.Muon([W], lr=1.0, scale="none", momentum=0.0, weight_decay=0.0, solver=solver)
        for _ in range(2):
            before = W.detach().clone()
            W.grad = torch.randn(12, 6)
            opt.step()
            errors[name] = opt.metrics(every=1)
        spectrum = torch.linalg.svdvals((before - W.detach()).double())
        expected = float((spectrum.square() - 1).square().mean().sqrt())
        assert errors[name]["orthogonality_error"]["0.0"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert errors["exact"]["orthogonality_error"]["0.0"] < 1e-5 < 0.1 < errors["one step"]["orthogonality_error"]["0.0"]


def test_rules_that_are_not_orthogonal_have_no_orthogonality_error():
    W = nn.Parameter(torch.randn(4, 4))
    opt = schatten.SpectralSGD([W], p=0.5)
    for _ in range(2):
        W.grad = torch.randn(4, 4)
        opt.step()
        found = opt.metrics(every=1)
    assert found["orthogonality_error"] == {} and found["spectral_bound"] == {} and found["update_rms"]


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (5, 1), (3, 8, 8)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_the_power_iteration_is_from_below_and_close(shape, size):
    W = torch.randn(shape) * size
    exact = torch.linalg.matrix_norm(W.double(), 2)
    found = spectral_norm(W).double()
    assert (found <= exact * (1 + 1e-5)).all()
    # Gaussian squares have the closest singular values; 16 iterations are within 5 % on them for this seed.
    assert (found >= 0.95 * exact).all() and ITERATIONS == 16


def test_a_zero_weight_has_norm_zero():
    assert float(spectral_norm(torch.zeros(3, 4))) == 0.0


def test_weights_tend_to_the_bound_and_stay_below_it():
    # A gradient that always points away pushes the weight onto the ball of radius c / lambda = 1 / 0.5.
    W = nn.Parameter(torch.zeros(4, 4))
    opt = schatten.Muon([W], lr=0.1, weight_decay=0.5, scale="none", solver=solvers.svd())
    for _ in range(200):
        W.grad = -torch.eye(4)
        opt.step()
    found = opt.metrics()
    assert found["spectral_bound"] == {"0.0": 2.0}
    assert 1.99 < found["spectral_norm"]["0.0"] <= 2.0 + 1e-5


def test_blocks_of_several_sizes_have_their_own_entries():
    W = nn.Parameter(torch.randn(16, 8))
    opt = schatten.Muon([{"params": [("qkv", W)], "layout": Layout(split=(8, 4, 4))}])
    for _ in range(2):
        W.grad = torch.randn_like(W)
        opt.step()
        found = opt.metrics(every=1)
    for key in ("effective_lr", "spectral_norm", "spectral_bound", "orthogonality_error"):
        assert list(found[key]) == ["qkv.0", "qkv.1"], key
    assert list(found["update_rms"]) == ["qkv"]
    kv = W.detach()[8:].reshape(2, 4, 8)
    assert found["spectral_norm"]["qkv.1"] == pytest.approx(float(torch.linalg.matrix_norm(kv, 2).max()), rel=0.05)


def test_a_parameter_that_never_had_a_gradient_is_named():
    net = model()
    opt = schatten.Muon(net)
    with_gradients(net)
    net[3].weight.grad = None
    opt.step()
    assert opt.metrics()["without_gradient"] == ["3.weight"]


def test_every_preset_has_metrics_and_measuring_changes_no_weight(any_preset):
    results = []
    for measured in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6, 4))]
        opt = any_preset([{"params": params[:1]}, {"params": params[1:], "layout": "experts"}])
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            step(opt)
            if measured:
                found = opt.metrics(every=1)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(value > 0 for value in found["update_rms"].values()) and len(found["update_rms"]) == 2


def test_between_measured_steps_nothing_is_computed(monkeypatch):
    calls = []
    original = schatten.metrics.Recorder.direction
    monkeypatch.setattr(schatten.metrics.Recorder, "direction", lambda *a: calls.append(1) or original(*a))
    net = model()
    opt = schatten.Muon(net)
    for _ in range(7):
        with_gradients(net)
        opt.step()
        opt.metrics(every=3)
    # Two shapes, measured on steps 3 and 6: the first call came after step 1.
    assert len(calls) == 4


def test_a_measuring_step_reads_no_value_back_to_the_host():
    params = [nn.Parameter(torch.empty(8, 6, device="meta")) for _ in range(2)]
    opt = schatten.Muon(params)
    opt._recorder.every = 1
    for p in params:
        p.grad = torch.empty_like(p)
    opt.step()
    assert len(opt._recorder.updates) == 2


def test_a_copy_measures_for_itself():
    net = model()
    opt = schatten.Muon(net)
    opt.metrics(every=2)
    other = copy.deepcopy(opt)
    assert other._recorder is not opt._recorder and other._recorder.every == 2


def test_the_orthogonality_error_of_a_scaled_isometry_is_known():
    assert float(orthogonality_error(3 * torch.eye(4)[:2])) == pytest.approx(8.0)
