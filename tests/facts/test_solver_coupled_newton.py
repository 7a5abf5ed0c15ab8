"""The published coupled iteration has the limits its authors' code has (reference/seeds.md, 2.3): ridge, damping, scale."""

import pytest
import torch

from schatten import maps, solvers
from tests.contracts.matrices import gaussian, with_spectrum

SOLVER = solvers.coupled_newton()
LOG2 = with_spectrum(256, 256, torch.logspace(0, -2, 256))


def power(G, p, solver=SOLVER):
    return maps.Power(p, solver=solver).grad(G)


def error(G, p, scale=1.0):
    exact = power(scale * G, p, solvers.svd())
    return float(torch.linalg.matrix_norm(power((scale * G).float(), p).double() - exact) / torch.linalg.matrix_norm(exact))


@pytest.mark.parametrize(
    ("G", "half", "quarter"),
    [
        (gaussian(1024, 256), 6e-5, 6e-5),
        (LOG2, 1.8e-3, 2.0e-3),
        (with_spectrum(256, 256, torch.logspace(0, -4, 256)), 2.6e-2, 8.5e-2),
        (with_spectrum(256, 256, torch.logspace(0, -6, 256)), 2.7e-2, 1.2e-1),
    ],
    ids=["Gaussian 1024x256", "log-spaced 1e-2", "1e-4", "1e-6"],
)
def test_its_error_is_the_published_one(G, half, quarter):
    assert error(G, 0.5) == pytest.approx(half, rel=0.06)
    assert error(G, 0.25) == pytest.approx(quarter, rel=0.06)


def test_it_damps_small_directions():
    # Ratio to the power at 1e-2 and 1e-3 of the largest for a log-spaced spectrum to 1e-4: 0.984, 0.484; 0.992, 0.687.
    s = torch.logspace(0, -4, 257, dtype=torch.float64)
    G = torch.diag(s)
    for p, ratios in ((0.5, (0.984, 0.484)), (0.25, (0.992, 0.687))):
        D = power(G, p).diagonal() / s**p
        for place, ratio in zip((1e-2, 1e-3), ratios, strict=True):
            assert float(D[(s - place).abs().argmin()]) == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize(("c", "half", "quarter"), [(1e-1, 1.2e-2, 1.3e-2), (1e-3, 0.42, 0.37), (1e-4, 0.79, 0.70)])
def test_its_result_depends_on_the_scale_of_the_input(c, half, quarter):
    assert error(LOG2, 0.5, c) == pytest.approx(half, rel=0.05)
    assert error(LOG2, 0.25, c) == pytest.approx(quarter, rel=0.05)


def test_the_tower_and_the_accelerated_iteration_do_not():
    for solver, bound in ((solvers.tower(dtype="float32"), 0.02), (solvers.coupled_minimax(), 1e-4)):
        for c in (1.0, 1e-4):
            exact = power(c * LOG2, 0.5, solvers.svd())
            difference = torch.linalg.matrix_norm(power((c * LOG2).float(), 0.5, solver).double() - exact)
            assert float(difference / torch.linalg.matrix_norm(exact)) < bound
