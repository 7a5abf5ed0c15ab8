"""MuonEq's default does not see how large each output's gradient is."""

import pytest
import torch

import schatten
from schatten.presets.muon_eq import Equilibrated, MuonEq
from tests.reference.twins import PRECISION, polar, problem, trained

OPTIONS = {"lr": 0.02, "weight_decay": 0.3, "solver": schatten.solvers.svd()}

ROWS = torch.tensor([1e-3, 1.0, 7.0, 1e4, 0.3], dtype=torch.float64).unsqueeze(1)
COLUMNS = torch.tensor([100.0, 1e-2, 3.0], dtype=torch.float64)

INVARIANT = {"rows": (ROWS, True), "columns": (COLUMNS, True), "both": (ROWS, False)}


@pytest.mark.parametrize("form", INVARIANT)
def test_rows_ignores_factors_of_rows_columns_those_of_columns_and_both_at_once_neither(form):
    factor, invariant = INVARIANT[form]
    W, gradients = problem((5, 3))
    ends = [trained(lambda p: MuonEq(p, form=form, **OPTIONS), W, g)[0] for g in (gradients, factor * gradients)]
    distance = (ends[0] - ends[1]).norm() / (ends[0] - W).norm()
    # A signal over its own row norms: the same up to rounding, whatever the momentum.
    assert distance < PRECISION if invariant else distance > 0.01


def test_where_all_rows_are_of_one_length_it_is_muon():
    W, gradients = problem((5, 3), steps=1)
    gradients = gradients / gradients.norm(dim=-1, keepdim=True) * 3e-6
    ours, _ = trained(lambda p: MuonEq(p, **OPTIONS), W, gradients)
    theirs, _ = trained(lambda p: schatten.Muon(p, **OPTIONS), W, gradients)
    torch.testing.assert_close(ours, theirs, rtol=PRECISION, atol=PRECISION)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("form", INVARIANT)
def test_rows_columns_and_signals_that_vanish_or_nearly_do_are_harmless(form, size):
    S = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    S[0, 0, 2], S[0, 0, :, 1] = 0, 0
    S[0, 0, 3], S[0, 0, :, 0] = S[0, 0, 3] * 1e-20, S[0, 0, :, 0] * 1e-20
    S[0, 1] = 0
    D, _ = Equilibrated(form)(S * size, {}, {})
    assert D.isfinite().all() and D[0, 1].count_nonzero() == 0
    assert D[0, 0, 2].count_nonzero() == 0 and D[0, 0, :, 1].count_nonzero() == 0


@pytest.mark.parametrize("exponent", [-120, 127])
@pytest.mark.parametrize("form", INVARIANT)
def test_the_direction_does_not_see_the_signals_size_up_to_the_ends_of_fp32(form, exponent):
    # Entries in [1/2, 1): powers of two round none of them, and rows of 16 of the largest are longer than fp32 can say.
    generator = torch.Generator().manual_seed(0)
    S = (0.5 + 0.5 * torch.rand(1, 1, 12, 16, generator=generator)) * torch.randn(12, 16, generator=generator).sign()
    direction = Equilibrated(form, schatten.maps.Nuclear(schatten.solvers.svd()))
    (D, _), (E, _) = direction(S, {}, {}), direction(S * 2.0**exponent, {}, {})
    assert torch.equal(D, E) and not torch.allclose(D[0, 0], polar(S[0, 0]), atol=1e-3)
