"""Momentum as a sum or as an average: the same trajectory under a scale-free map at constant beta, and only then."""

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers

STEPS = 30


def run(form, dtype, solver, nesterov=True, betas=(0.95,) * STEPS, lr=0.05):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype))
    opt = schatten.Muon([p], lr=lr, nesterov=nesterov, form=form, solver=solver)
    for beta in betas:
        opt.param_groups[0]["momentum"] = beta
        p.grad = torch.randn(6, 4, generator=generator, dtype=torch.float64).to(dtype)
        opt.step()
    return p.detach(), opt.state[p]["momentum_buffer"]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("dtype", "solver", "precision"),
    [
        # The two signals differ by a factor 1 - beta and by an ulp or two per operation, which the polar factor multiplies
        # by up to the signal's condition. Measured 4e-16 and 2e-7; at a changing beta (below) the forms are 0.14 apart.
        (torch.float64, solvers.svd(), 1e-12),
        (torch.float32, solvers.svd(), 1e-5),
        (torch.float32, solvers.polynomial(dtype="float32"), 1e-5),
    ],
    ids=["fp64 svd", "fp32 svd", "fp32 polynomial"],
)
def test_at_constant_beta_both_forms_give_one_trajectory_and_states_a_factor_apart(nesterov, dtype, solver, precision):
    (ema, average), (total, accumulated) = (run(form, dtype, solver, nesterov) for form in ("ema", "sum"))
    assert (ema - total).norm() < precision * ema.norm()
    torch.testing.assert_close(average, accumulated * (1 - 0.95), rtol=precision, atol=precision)


def test_when_beta_changes_on_the_way_the_forms_part():
    betas = [0.5] * (STEPS // 2) + [0.99] * (STEPS // 2)
    ema, total = (run(form, torch.float64, solvers.svd(), betas=betas)[0] for form in ("ema", "sum"))
    assert (ema - total).norm() > 0.01 * ema.norm()


def test_momentum_zero_makes_the_direction_that_of_the_gradient_alone():
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    opt = schatten.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, scale="none", solver=solvers.svd())
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        opt.step()
        U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
        # lr 1 and decay 0: the step is -U V^T to fp64 rounding.
        torch.testing.assert_close(before - p.detach(), U @ Vh, rtol=0, atol=1e-13)


def test_the_update_has_the_rms_of_adamw_by_default():
    p = nn.Parameter(torch.zeros(64, 32))
    opt = schatten.Muon([p], lr=1.0, solver=solvers.svd())
    p.grad = torch.randn(64, 32)
    opt.step()
    # U V^T of a 64 x 32 matrix has RMS 1 / sqrt(64), which 0.2 sqrt(64) makes 0.2 exactly; fp32.
    torch.testing.assert_close(p.detach().square().mean().sqrt(), torch.tensor(0.2), rtol=1e-5, atol=0)
