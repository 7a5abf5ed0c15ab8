"""GradScaler: the step divides by the scale, skips as a whole where a gradient overflowed, and never writes to gradients."""

import pytest
import torch
from torch import nn

import schatten
from schatten import finite, solvers

OPTIONS = {"lr": 0.1, "solver": solvers.svd()}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=2.0**14, **options)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.fixture(params=[False, True], ids=["the scaler divides and skips", "the step divides and skips"])
def in_step(request):
    """Whether the optimizer takes torch's offer to divide and skip itself, which saves the scaler its wait."""
    return request.param


# One rule that does not see the size of a gradient, and one that does.
@pytest.mark.parametrize("preset", [schatten.Muon, lambda net, **options: schatten.SpectralSGD(net, p=0.5, **options)])
@pytest.mark.parametrize("masked", [False, True], ids=["host", "device mask"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled by hand"])
def test_a_scaled_run_is_the_plain_run(monkeypatch, masked, unscaled, in_step, preset):
    monkeypatch.setattr(finite, "looking_is_free", lambda p: not masked)
    a, b = model(), model()
    opt, plain, scaling = preset(a, **OPTIONS), preset(b, **OPTIONS), scaler()
    opt._step_supports_amp_scaling = in_step
    X = torch.randn(8, 4, dtype=torch.float64)
    for _ in range(3):
        opt.zero_grad()
        scaling.scale(a(X).square().mean()).backward()
        kept = [p.grad.clone() for p in a.parameters()]
        if unscaled:
            scaling.unscale_(opt)
            kept = [p.grad.clone() for p in a.parameters()]
        scaling.step(opt)
        # Where the scaler divides, it does so in place.
        assert unscaled or not in_step or all(torch.equal(p.grad, g) for p, g in zip(a.parameters(), kept, strict=True))
        scaling.update()
        plain.zero_grad()
        b(X).square().mean().backward()
        plain.step()
    # A power of two divides exactly, so only the order in which autograd multiplied differs.
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert opt.metrics()["skipped_total"] == 0


@pytest.mark.parametrize("masked", [False, True], ids=["host", "device mask"])
def test_one_overflowed_gradient_skips_the_whole_step_and_lowers_the_scale(monkeypatch, masked, in_step):
    monkeypatch.setattr(finite, "looking_is_free", lambda p: not masked)
    net = model()
    opt, scaling = schatten.Muon(net, **OPTIONS), scaler()
    opt._step_supports_amp_scaling = in_step
    before = weights(net)
    scaling.scale(net(torch.randn(8, 4, dtype=torch.float64)).square().mean()).backward()
    net[2].bias.grad[0] = torch.inf
    scaling.step(opt)
    scaling.update()
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    assert scaling.get_scale() == 2.0**13
    names = ("0.weight", "0.bias", "2.weight", "2.bias") if in_step else ()
    assert opt.metrics()["skipped"] == dict.fromkeys(names, 1)


def test_after_the_step_nothing_of_the_scaler_is_left():
    net = model()
    opt, scaling = schatten.Muon(net, **OPTIONS), scaler()
    opt._step_supports_amp_scaling = True
    scaling.scale(net(torch.randn(8, 4, dtype=torch.float64)).square().mean()).backward()
    scaling.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")


def test_accumulated_micro_batches_are_the_large_batch():
    a, b = model(), model()
    opt, large = schatten.Muon(a, **OPTIONS), schatten.Muon(b, **OPTIONS)
    X = torch.randn(12, 4, dtype=torch.float64)
    for _ in range(3):
        opt.zero_grad()
        for part in X.chunk(4):
            (a(part).square().mean() / 4).backward()
        opt.step()
        large.zero_grad()
        b(X).square().mean().backward()
        large.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_an_autocast_loop_with_a_scaler_lowers_the_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    opt, scaling = schatten.Muon(net, lr=1e-2), scaler()
    X, Y = torch.randn(64, 8), torch.randn(64, 4)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.mse_loss(net(X), Y)
        scaling.scale(loss).backward()
        scaling.step(opt)
        scaling.update()
        losses.append(loss.item())
    # Without a step or with a wrong sign the loss stays where it is, about 1, or grows.
    assert losses[-1] < 0.7 * losses[0]
