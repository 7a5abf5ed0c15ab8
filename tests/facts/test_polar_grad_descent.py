"""PolarGrad without momentum is steepest descent for the squared spectral norm, with its guarantees on smooth functions."""

import pytest
import torch
from torch import nn

import schatten
from schatten.presets.polar_grad import PolarGrad

EXACT = schatten.solvers.svd()

M, N = 4, 7


class Quadratic:
    """F(W) = <W - W*, A (W - W*)> / 2 for m x n with m <= n and A positive definite.

    <X, A X> = tr(A X X^T) is at most tr(A) ||X||_op^2, with equality where the rows of X are orthonormal: its smoothness in
    the spectral norm is L = tr(A).
    """

    def __init__(self, isotropic=False):
        generator = torch.Generator().manual_seed(0)
        B = torch.randn(M, M, generator=generator, dtype=torch.float64)
        self.A = 0.7 * torch.eye(M, dtype=torch.float64) if isotropic else B @ B.T + 0.1 * torch.eye(M)
        self.target, self.start = torch.randn(2, M, N, generator=generator, dtype=torch.float64)
        self.L = self.A.trace().item()

    def value(self, W):
        X = W - self.target
        return ((X * (self.A @ X)).sum() / 2).item()

    def gradient(self, W):
        return self.A @ (W - self.target)


def nuclear(G):
    return torch.linalg.svdvals(G).sum().item()


def descent(F, lr, steps):
    """(value before, gradient, update, value after) of every step of PolarGrad without momentum."""
    p = nn.Parameter(F.start.clone())
    opt = PolarGrad([p], lr=lr, momentum=0.0, solver=EXACT)
    for _ in range(steps):
        before = p.detach().clone()
        p.grad = F.gradient(before)
        opt.step()
        yield F.value(before), p.grad, p.detach() - before, F.value(p.detach())


def test_lr_one_over_l_lowers_a_quadratic_by_the_squared_nuclear_norm_over_2_l_at_least():
    F = Quadratic()
    rate = torch.linalg.eigvalsh(F.A).min().item() / F.L
    for before, G, _, after in descent(F, 1 / F.L, 100):
        # Values of up to 100 in fp64.
        assert after <= before - nuclear(G) ** 2 / (2 * F.L) + 1e-12
        # ||G||_*^2 >= ||G||_F^2 >= 2 lambda_min F, so constant lr converges linearly, which no sign-like step does.
        assert after <= (1 - rate) * before + 1e-12


def test_on_an_isotropic_quadratic_it_is_lowered_by_exactly_that():
    F = Quadratic(isotropic=True)
    for before, G, _, after in descent(F, 1 / F.L, 20):
        assert before - after == pytest.approx(nuclear(G) ** 2 / (2 * F.L), rel=1e-9, abs=1e-13)


def test_with_three_times_that_lr_the_isotropic_one_grows_so_the_constant_is_the_spectral_norms():
    F = Quadratic(isotropic=True)
    # 1 / lambda_max, the rate of gradient descent, is m times as long here.
    *_, after = next(descent(F, 3 / F.L, 1))
    assert after > F.value(F.start)


def test_the_update_is_the_steepest_descent_step_of_the_squared_spectral_norm():
    F = Quadratic()
    _, G, update, _ = next(descent(F, 1 / F.L, 1))

    def model(X):
        return ((G * X).sum() + F.L / 2 * torch.linalg.matrix_norm(X, ord=2) ** 2).item()

    # By duality the model is nowhere below -||G||_*^2 / (2 L), which the update attains.
    assert model(update) == pytest.approx(-(nuclear(G) ** 2) / (2 * F.L), rel=1e-12)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(20):
            other = update + size * torch.randn(M, N, generator=generator, dtype=torch.float64)
            assert model(other) > model(update)


def test_the_step_is_proportional_to_the_gradient():
    F = Quadratic()
    _, G, update, _ = next(descent(F, 0.01, 1))
    p = nn.Parameter(F.start.clone())
    opt = PolarGrad([p], lr=0.01, momentum=0.0, solver=EXACT)
    p.grad = 2.0**-20 * G
    opt.step()
    # The weights' own rounding, 1e-16, beside a step of 1e-7.
    torch.testing.assert_close((p.detach() - F.start) * 2.0**20, update, rtol=1e-6, atol=1e-9)
