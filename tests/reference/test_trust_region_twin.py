"""Kovalev's trust region: closed forms where there are some, a direct search where there are none."""

import math

import pytest
import torch

import schatten
from schatten import maps
from schatten.retractions import CompositeStep
from tests.reference.twins import assert_equals_twin, polar, problem

LR, BETA = 0.1, 0.9


def twin(step):
    def run(W, gradients):
        M = torch.zeros_like(W)
        for G in gradients:
            M = BETA * M + (1 - BETA) * G
            W = step(W, M)
        return W

    return run


def clipped(Z):
    U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
    return U @ torch.diag(s.clamp(max=LR)) @ Vh


def entrywise(W, M, decay, penalty):
    """argmin over |x - w| <= LR of m x + decay/2 x^2 + penalty |x|: convex in one variable, so the free minimum, clamped."""
    free = torch.sign(-M) * (M.abs() - penalty).clamp(min=0) / decay
    return free.clamp(min=W - LR, max=W + LR)


SVD = maps.Nuclear(schatten.solvers.svd())


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({"norm": SVD}, lambda W, M: W - LR * polar(M)),
        ({"norm": maps.Frobenius()}, lambda W, M: W - LR * M / M.norm()),
        ({"norm": maps.L1()}, lambda W, M: W - LR * M.sign()),
        ({"norm": SVD, "weight_decay": 0.7}, lambda W, M: W + clipped(-M / 0.7 - W)),
        ({"norm": maps.L1(), "weight_decay": 0.7}, lambda W, M: entrywise(W, M, 0.7, 0.0)),
    ],
    ids=["spectral", "Frobenius", "entries", "spectral with decay", "entries with decay"],
)
def test_without_a_penalty_the_step_is_its_closed_form(options, step):
    build = lambda params: schatten.TrustRegion(params, lr=LR, momentum=BETA, scale="none", **options)  # noqa: E731
    assert_equals_twin(build, twin(step))


def test_with_an_l1_penalty_on_entries_it_is_the_closed_form_of_one_variable():
    options = {"norm": maps.L1(), "penalty": 0.2 * maps.L1(), "weight_decay": 0.7, "iterations": 200}
    build = lambda params: schatten.TrustRegion(params, lr=LR, momentum=BETA, scale="none", **options)  # noqa: E731
    # The splitting converges linearly here: 200 iterations leave is 1e-9 of the radius.
    assert_equals_twin(build, twin(lambda W, M: entrywise(W, M, 0.7, 0.2)), precision=1e-6)


def objective(X, M, decay, penalty):
    return (M * X).sum() + decay / 2 * X.square().sum() + penalty.value(X)


PENALTIES = {"nuclear": 0.5 * maps.Nuclear(), "l1": 0.2 * maps.L1()}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", PENALTIES)
def test_with_any_penalty_nothing_in_the_ball_is_better(name, decay):
    penalty = PENALTIES[name]
    for seed in range(4):
        W, (M, *_) = problem((6, 4), seed)
        W, M = W / 4, M / 4
        group = {"weight_decay": decay}
        best = CompositeStep(SVD, penalty, iterations=5000)(W, M, LR, {}, group)[0]
        default = CompositeStep(SVD, penalty)(W, M, LR, {}, group)[0]
        for X in (best, default):
            assert torch.linalg.matrix_norm(X - W, ord=2) <= LR * (1 + 1e-12)
        value = objective(best, M, decay, penalty)
        gained = objective(W, M, decay, penalty) - value
        assert gained > 0
        # Optimality of a convex problem: no feasible point improves, near or far, along Gaussian and polar directions.
        generator = torch.Generator().manual_seed(seed)
        for size in (1e-4, 1e-2, 1.0):
            for _ in range(50):
                Z = best - W + size * LR * torch.randn(W.shape, generator=generator, dtype=W.dtype)
                other = W + clipped(Z)
                assert objective(other, M, decay, penalty) >= value - 1e-9 * gained
        assert objective(default, M, decay, penalty) - value <= 0.01 * gained


def test_the_steps_without_ball_are_the_penalties_own():
    """A radius beyond every minimum leaves min <M, X> + decay/2 ||X||^2 + a ||X||_*: soft thresholding of -M / decay."""
    W, (M, *_) = problem((5, 3))
    step = CompositeStep(SVD, 0.3 * maps.Nuclear(), iterations=2000)
    X, _ = step(W, M, 100.0, {}, {"weight_decay": 0.5})
    U, s, Vh = torch.linalg.svd(-M / 0.5, full_matrices=False)
    assert torch.allclose(X, U @ torch.diag((s - 0.3 / 0.5).clamp(min=0)) @ Vh, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": maps.Huber(0.1)}, r"norm must be a norm of schatten.maps, such as Nuclear\(\), got Huber"),
        ({"penalty": maps.Power(0.5)}, "penalty must be a multiple of a norm of schatten.maps"),
        ({"penalty": 0.5 * maps.Huber(0.1)}, "penalty must be a multiple of a norm of schatten.maps"),
        ({"iterations": 0}, "iterations must be a whole number >= 1, got 0"),
    ],
)
def test_what_is_no_norm_is_refused(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        schatten.TrustRegion([torch.nn.Parameter(torch.zeros(2, 2))], **options)


def test_a_zero_learning_rate_leaves_the_weights():
    W = torch.nn.Parameter(torch.randn(3, 2))
    before = W.detach().clone()
    opt = schatten.TrustRegion([W], lr=0.0, weight_decay=0.1, penalty=0.1 * maps.L1())
    W.grad = torch.randn(3, 2)
    opt.step()
    assert math.isclose((W - before).norm().item(), 0, abs_tol=1e-30)
