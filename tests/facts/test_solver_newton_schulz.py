"""Keller Jordan's schedule: the published ranges (reference/coefficients.md, 1), read off the solver itself in fp64."""

import pytest
import torch

from schatten.solvers import newton_schulz
from schatten.solvers.schedules import SCHEDULES

(KELLER,) = SCHEDULES["keller"].quintics


def outputs(sigma: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What the solver makes of each sigma in (0, 1]: diag(sigma, sqrt(1 - sigma^2)) has Frobenius norm 1 and keeps it."""
    X = torch.diag_embed(torch.stack([sigma, (1 - sigma.square()).clamp_min(0).sqrt()], dim=-1))
    P = newton_schulz(steps=steps, dtype="float64")(X)
    assert P[:, 0, 1].abs().max() == 0
    return P[:, 0, 0]


def grid(low: float) -> torch.Tensor:
    return torch.cat([torch.logspace(torch.tensor(low).log10().item(), 0, 20_001), torch.linspace(low, 1, 20_001)]).double()


@pytest.mark.parametrize(
    ("steps", "low", "smallest", "largest"),
    [
        (5, 1e-2, 0.682, 1.134),
        (5, 1e-3, 0.471, 1.202),
        (5, 1e-4, 0.048, 1.202),
        (10, 1e-4, 0.682, 1.134),
        (15, 1e-3, 0.682, 1.134),
    ],
)
def test_singular_values_end_in_the_published_range(steps, low, smallest, largest):
    y = outputs(grid(low), steps)
    # Published to three decimals.
    assert float(y.min()) == pytest.approx(smallest, abs=6e-4)
    assert float(y.max()) == pytest.approx(largest, abs=6e-4)


def test_one_is_no_fixed_point():
    assert float(outputs(torch.ones(1).double(), steps=1)) == pytest.approx(0.701, abs=1e-9)
    assert sum(KELLER) == pytest.approx(0.701, abs=1e-12)


def test_five_steps_lift_a_tiny_singular_value_by_485():
    sigma = torch.tensor([1e-6], dtype=torch.float64)
    # The cubic term takes (485 * 1e-6)^2 of it.
    assert float(outputs(sigma) / sigma) == pytest.approx(KELLER[0] ** 5, rel=1e-4)
    assert KELLER[0] ** 5 == pytest.approx(485, abs=0.5)


def test_it_agrees_with_keller_jordans_code():
    # zeropower_via_newtonschulz5 of KellerJordan/Muon, without its bf16 cast and with its eps.
    a, b, c = (3.4445, -4.7750, 2.0315)
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = G / (G.norm() + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    # The eps moves X by 3e-9 of itself, at most 485 times amplified.
    assert (newton_schulz(dtype="float64")(G) - X).abs().max() < 2e-6


def test_it_agrees_with_torch_optim_muon_within_bf16():
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    W = torch.nn.Parameter(torch.zeros(24, 40))
    reference = torch.optim.Muon([W], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    W.grad = G.clone()
    reference.step()
    P = newton_schulz(dtype="bfloat16")(G)
    # Both round to bf16, 0.4 %, at every product; torch scales by sqrt(max(1, m/n)) = 1 here.
    assert (P + W.detach()).norm() < 0.02 * P.norm()
