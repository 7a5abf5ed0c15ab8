"""Stepping in backward: the same training with one gradient alive at a time, and a loop that need not change."""

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers

OPTIONS = {"lr": 0.01, "solver": solvers.svd()}


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double()


def test_it_trains_as_steps_after_backward_do_and_leaves_no_gradient():
    a, b = model(), model()
    opt, plain = schatten.Muon(a, **OPTIONS), schatten.Muon(b, **OPTIONS)
    opt.step_in_backward()
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (opt, plain)]
    X = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(4):
        a(X).square().mean().backward()
        assert all(p.grad is None for p in a.parameters())
        opt.step()
        plain.zero_grad()
        b(X).square().mean().backward()
        plain.step()
        for schedule in schedules:
            schedule.step()
    # One matrix at a time or a batch of two: the last places of fp64.
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert [g["step"] for g in opt.param_groups] == [g["step"] for g in plain.param_groups] == [4, 4]


def test_at_most_one_gradient_is_alive_at_a_time():
    net = model()
    opt = schatten.Muon(net, **OPTIONS)
    alive = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in net.parameters())))
    with opt.step_in_backward():
        net(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert max(alive) == 1 and len(alive) == 6


def test_closing_removes_the_hooks():
    net = model()
    opt = schatten.Muon(net, **OPTIONS)
    with opt.step_in_backward():
        pass
    net(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_non_finite_gradient_is_skipped_and_counted():
    net = model()
    opt = schatten.Muon(net, **OPTIONS)
    before = [p.detach().clone() for p in net.parameters()]
    with opt.step_in_backward():
        (net(torch.randn(4, 6, dtype=torch.float64)).sum() * torch.inf).backward()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    assert opt.metrics()["skipped_total"] == 6


def test_frozen_parameters_are_left_alone():
    net = model()
    net[0].requires_grad_(False)
    with schatten.Muon(net, **OPTIONS).step_in_backward():
        net(torch.randn(4, 6, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("preset", [schatten.JaguarMuon, schatten.EF21Muon])
def test_presets_that_evaluate_gradients_themselves_refuse_it(preset):
    with pytest.raises(TypeError, match=f"{preset.__name__} evaluates gradients in step"):
        preset([nn.Parameter(torch.zeros(4, 4))]).step_in_backward()


def test_what_metrics_measures_is_measured_in_backward_too():
    measured = []
    for in_backward in (True, False):
        net = model()
        opt = schatten.Muon(net, **OPTIONS)
        opt.metrics(every=1)
        if in_backward:
            opt.step_in_backward()
        torch.manual_seed(1)
        for _ in range(2):
            opt.zero_grad()
            net(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()
            opt.step()
            found = opt.metrics(every=1)
        measured.append(found)
    for key in ("update_rms", "orthogonality_error"):
        assert measured[0][key] == pytest.approx(measured[1][key], rel=1e-6, abs=1e-9) and measured[0][key]
    assert measured[0]["norms"]["adamw"] == pytest.approx(measured[1]["norms"]["adamw"])


def test_a_sparse_gradient_is_refused_in_backward():
    table = nn.Embedding(10, 4, sparse=True)
    opt = schatten.Muon([{"params": table.weight, "algorithm": "adamw"}])
    with (
        opt.step_in_backward(),
        pytest.raises(RuntimeError, match="Gradients must be dense, but that of the parameter number 0"),
    ):
        table(torch.tensor([1, 2])).sum().backward()


def test_a_rule_that_counts_steps_on_the_host_counts_the_same():
    # SOAP makes its basis at the first step.
    a, b = model(), model()
    opt, plain = (schatten.SOAPMuon(net, lr=0.01, solver=solvers.svd()) for net in (a, b))
    opt.step_in_backward()
    X = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(3):
        a(X).square().mean().backward()
        opt.step()
        plain.zero_grad()
        b(X).square().mean().backward()
        plain.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_what_was_written_into_groups_is_looked_at_before_the_first_weight_changes_in_backward():
    net = model()
    opt = schatten.Muon(net, **OPTIONS)
    with opt.step_in_backward():
        net(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()
        opt.step()
        before = [p.detach().clone() for p in net.parameters()]
        opt.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr must be finite and >= 0"):
            net(torch.randn(4, 6, dtype=torch.float64)).square().mean().backward()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
