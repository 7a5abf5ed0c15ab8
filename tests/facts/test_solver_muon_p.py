"""Muon^p's recurrences give the released curves, which are not the powers they are named after."""

import pytest
import torch

from schatten.solvers import muon_p

PLACES = (1e-3, 1e-2, 0.03, 0.1, 0.3, 0.6, 1.0)

# reference/coefficients.md, section 6: output over sigma^p after six steps.
CURVES = {
    "1/3": (0.05, 0.23, 0.47, 0.88, 1, 1, 1),
    "1/5": (0.01, 0.06, 0.13, 0.35, 0.80, 1.00, 1),
    "1/7": (0.005, 0.04, 0.09, 0.26, 0.66, 0.99, 1),
    "1/15": (0.002, 0.02, 0.05, 0.16, 0.46, 0.87, 1),
    "3/5": (0.06, 0.16, 0.25, 0.40, 0.68, 0.96, 1),
    "13/15": (0.40, 0.54, 0.63, 0.74, 0.85, 0.94, 1),
    "1/2": (0.03, 0.10, 0.18, 0.36, 0.92, 0.71, 1),
}


@pytest.mark.parametrize("p", CURVES)
def test_the_output_over_the_power_is_the_published_curve(p):
    numerator, denominator = map(int, p.split("/"))
    exponent = numerator / denominator
    for place, expected in zip(PLACES, CURVES[p], strict=True):
        # A matrix of Frobenius norm 1 with this singular value.
        rest = (1 - place**2) ** 0.5
        D = muon_p(p, dtype="float64")(torch.diag(torch.tensor([place, rest]).double()))
        assert float(D[0, 0]) / place**exponent == pytest.approx(expected, abs=0.006)


def test_more_steps_come_nearer_to_the_power():
    # p = 1/3 at sigma = 1e-2: 0.35, 0.62, 0.92 of the power after 10, 20, 40 steps.
    G = torch.diag(torch.tensor([1e-2, (1 - 1e-4) ** 0.5]).double())
    for steps, expected in ((10, 0.35), (20, 0.62), (40, 0.92)):
        D = muon_p("1/3", steps=steps, dtype="float64")(G)
        assert float(D[0, 0]) / 1e-2 ** (1 / 3) == pytest.approx(expected, abs=0.006)


def test_it_is_a_value_and_keeps_dtype_and_orientation():
    solver = muon_p("1/3", dtype="float32")
    assert repr(solver) == "muon_p('1/3', steps=6, dtype='float32')" and solver == muon_p("1/3", dtype=torch.float32)
    X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solver(X.mT).mT, solver(X), rtol=0, atol=1e-6)
    assert solver(X.bfloat16()).dtype == torch.bfloat16
