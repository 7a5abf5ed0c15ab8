"""A slow literal EMA-Nesterov around gradient descent in fp64, one formula at a time, which the wrapper must equal."""

import pytest
import torch
from torch import nn

from schatten.ema_nesterov import EMANesterov

STEPS = 40


def gradient(W, A):
    """Of sum(log cosh(A W)), as a formula."""
    return A.T @ torch.tanh(A @ W)


def twin(W, A, lrs, *, beta, decay, start=0, stop=None, mu=0.0, lr_max=None):
    """(W, W shifted, d) after gradient descent with heavy-ball `mu` from the shifted weights, one step for each of `lrs`."""
    lr_max = max(lrs) if lr_max is None else lr_max
    d, buffer, ahead = torch.zeros_like(W), torch.zeros_like(W), W
    for t, lr in enumerate(lrs):
        buffer = mu * buffer + gradient(ahead, A)
        new = ahead - lr * buffer
        d = decay * d + (1 - decay) * (new - W)
        W = new
        on = start <= t + 1 and (stop is None or t + 1 < stop)
        ahead = W + beta * min(1, lr / lr_max) * d if on else W
    return W, ahead, d


def problem():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))


def run(W, A, factor=None, *, lr, mu=0.0, tensor_lr=False, **options):
    p = nn.Parameter(W.clone())
    inner = torch.optim.SGD([p], lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr, momentum=mu)
    opt = EMANesterov(inner, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor) if factor else None
    for _ in range(STEPS):
        opt.zero_grad()
        torch.log(torch.cosh(A @ p)).sum().backward()
        opt.step()
        if scheduler:
            scheduler.step()
    ahead = p.detach().clone()
    with opt.unshifted():
        return p.detach().clone(), ahead, opt.state_dict()["ema_nesterov"]["paths"][0]["displacement"]


# Both sides do fp64 arithmetic in other orders, 1e-16 per operation; the problem contracts, so errors do not grow.
PRECISION = 1e-13


def assert_equal(ours, theirs):
    for name, a, b in zip(("W", "W shifted", "d"), ours, theirs, strict=True):
        assert (a - b).norm() <= PRECISION * b.norm(), f"{name}: {(a - b).norm() / b.norm():.2g}"


def square(W):
    """A 5 x 5 well-scaled A, so that lr 0.1 is stable with any momentum here."""
    return W @ W.T / 10


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("beta", [0.3, 0.6])
@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_the_wrapper_equals_its_formula(beta, decay, mu):
    W, A = problem()
    options = {"beta": beta, "decay": decay, "mu": mu}
    assert_equal(run(W, square(A), lr=0.1, **options), twin(W, square(A), [0.1] * STEPS, **options))


@pytest.mark.parametrize("window", [(0, None), (7, 20), (7, None), (0, 0), (0, 1), (30, 30), (1, 2), (STEPS, None)])
def test_it_shifts_within_its_window_only(window):
    W, A = problem()
    options = {"beta": 0.6, "decay": 0.8, "start": window[0], "stop": window[1]}
    assert_equal(run(W, square(A), lr=0.1, **options), twin(W, square(A), [0.1] * STEPS, **options))


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_the_shift_follows_the_schedule_of_the_step_before(tensor_lr):
    W, A = problem()

    def factor(t):
        return min(1.0, (t + 1) / 6, (STEPS - t) / 20)

    options = {"beta": 0.6, "decay": 0.8}
    lrs = [0.1 * factor(t) for t in range(STEPS)]
    ours = run(W, square(A), factor, lr=0.1, tensor_lr=tensor_lr, **options)
    assert_equal(ours, twin(W, square(A), lrs, lr_max=0.1, **options))


def test_an_lr_above_its_maximum_counts_as_the_maximum():
    W, A = problem()
    options = {"beta": 0.6, "decay": 0.8}
    lrs = [0.1 * (1 + t / STEPS) for t in range(STEPS)]
    ours = run(W, square(A), lambda t: 1 + t / STEPS, lr=0.1, **options)
    assert_equal(ours, twin(W, square(A), lrs, lr_max=0.1, **options))


def test_on_a_straight_path_steps_grow_by_one_over_one_minus_beta():
    # A linear loss: every inner step is 0.1, the shift beta d adds to it, and d tends to the whole step.
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt, seen = EMANesterov(torch.optim.SGD([p], lr=0.1), beta=0.6, decay=0.5), []
    for _ in range(200):
        p.grad = -torch.ones_like(p)
        opt.step()
        with opt.unshifted():
            seen.append(p.item())
    # The distance to the limit shrinks by decay + (1 - decay) beta = 0.8 per step: 0.8^199 is 1e-19.
    assert seen[-1] - seen[-2] == pytest.approx(0.1 / (1 - 0.6), rel=1e-12)


def test_a_parameter_whose_gradient_stops_coasts_along_its_own_path():
    p, other = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    opt = EMANesterov(torch.optim.SGD([p, other], lr=1.0), beta=0.6, decay=0.5)
    p.grad = -torch.ones_like(p)
    opt.step()
    p.grad = None
    for t in range(200):
        other.grad = torch.full_like(other, float(t))
        opt.step()
    # d = 1/2 after the first step; from there it goes beta d / ((1 - decay) (1 - beta)) = 1.5 further.
    assert p.item() == pytest.approx(1 + 0.6 * 0.5 / (0.5 * 0.4), rel=1e-12)
