"""Effective rank, densities and block masses from products agree with the explicit Hessian."""

import math

import pytest
import torch
from torch import nn

from schatten.diagnostics.block_hessian import block_hessian, exact_hessian, mass_within, structure
from schatten.diagnostics.block_mass import block_mass, block_masses
from schatten.diagnostics.deflation import look, rest_of_probe, tridiagonal
from schatten.diagnostics.hessian_rank import hessian_rank, hessian_spectrum
from schatten.diagnostics.probes import mean_of, ratio_of, widening
from tests.reference.hessian_models import explicit
from tests.reference.structured_hessians import SHAPE, SPECTRA, N, gen, network, products, rotated


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_block_hessian_is_that_of_autograd(activation):
    product, W, loss = network(activation=activation, steps=5)
    found = exact_hessian(product, W)
    torch.testing.assert_close(found.matrix, explicit(loss, [W]), rtol=1e-10, atol=1e-12)
    assert found.asymmetry < 1e-13
    assert torch.equal(found.matrix, found.matrix.mT)


def test_the_network_of_these_tests_is_indefinite():
    values = torch.linalg.eigvalsh(block_hessian(*network(steps=5)[:2]))
    assert values.min() < -0.02 * values.max() < 0


def test_a_block_that_is_too_large_is_refused_with_what_it_would_need():
    with pytest.raises(ValueError, match=r"shape \(200, 100\) is 20000 x 20000.*limit=10000.*20000 products and 3.0 GiB"):
        block_hessian(lambda V: V, torch.zeros(200, 100))


def test_half_precision_products_fill_an_fp32_matrix():
    H = exact_hessian(lambda V: V.bfloat16(), torch.zeros(2, 3, dtype=torch.bfloat16))
    assert torch.equal(H.matrix, torch.eye(6))


@pytest.mark.parametrize("name", SPECTRA)
def test_the_numbers_of_an_explicit_hessian_are_those_of_its_eigenvalues(name):
    d = SPECTRA[name]
    found = structure(rotated(d))
    expected = (d.abs().sum(), d.abs().max(), d.norm(), d.sum(), d.abs().sum() / d.abs().max())
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-10)


def test_the_mass_within_parts_is_the_sum_over_their_blocks():
    shape = (2, 3, 4)
    H = rotated(torch.randn(24, generator=gen(0), dtype=torch.float64))
    T = H.view(*shape, *shape)
    total = H.square().sum()
    rows = sum(T[b, i, :, b, i, :].square().sum() for b in range(2) for i in range(3)) / total
    columns = sum(T[b, :, j, b, :, j].square().sum() for b in range(2) for j in range(4)) / total
    matrices = sum(T[b, :, :, b, :, :].square().sum() for b in range(2)) / total
    parts = torch.arange(2)[:, None, None].expand(shape)
    for partition, share in (("rows", rows), ("columns", columns), (parts, matrices)):
        torch.testing.assert_close(mass_within(H, shape, partition), share)


@pytest.mark.parametrize("name", SPECTRA)
def test_estimates_lie_within_four_errors_of_the_explicit_hessian(name):
    H = rotated(SPECTRA[name])
    exact, found = structure(H), hessian_spectrum(products(H), torch.zeros(SHAPE).double(), probes=8, steps=16)
    for key in ("nuclear", "frobenius", "trace", "effective_rank"):
        value, error = getattr(found, key)
        # Student's t with 7 degrees of freedom, widened: four errors fail 1 in 700 times.
        assert (value - getattr(exact, key)).abs() <= 4 * error, key
        assert error < 0.3 * exact.nuclear, key
    # Lanczos comes from below; 1e-6 of it for what 16 steps leave of the slowest spectrum.
    assert -1e-12 <= (exact.operator - found.operator.value) <= 1e-3 * exact.operator


def test_a_network_has_the_effective_rank_of_its_explicit_hessian():
    product, W, _ = network(steps=5)
    exact = structure(block_hessian(product, W))
    value, error = hessian_rank(product, W, probes=8, steps=20)
    assert (value - exact.effective_rank).abs() <= 4 * error
    assert error < 0.05 * value


def test_with_as_many_steps_as_entries_all_is_exact():
    H = rotated(SPECTRA["continuum"])
    exact, found = structure(H), hessian_spectrum(products(H), torch.zeros(SHAPE).double(), probes=2, steps=2 * N)
    for key in ("nuclear", "frobenius", "trace", "effective_rank"):
        torch.testing.assert_close(getattr(found, key).value, getattr(exact, key), rtol=1e-8, atol=1e-8)
        assert getattr(found, key).error < 1e-8


def test_a_hessian_of_zeros_has_rank_zero():
    found = hessian_spectrum(torch.zeros_like, torch.zeros(SHAPE))
    assert [float(e.value) for e in (found.effective_rank, found.nuclear, found.frobenius)] == [0, 0, 0]
    assert all(float(e.error) == 0 for e in (found.effective_rank, found.nuclear, found.frobenius))


def test_several_tensors_are_one_hessian():
    H = rotated(SPECTRA["outliers"])
    like = [torch.zeros(4, 5).double(), torch.zeros(40).double()]

    def product(vectors):
        flat = H @ torch.cat([v.reshape(-1) for v in vectors])
        return flat[:20].view(4, 5), flat[20:]

    joined = hessian_spectrum(product, like, probes=3, steps=8)
    flat = hessian_spectrum(lambda v: H @ v, torch.zeros(N).double(), probes=3, steps=8)
    torch.testing.assert_close(joined.nuclear.value, flat.nuclear.value)


def test_the_density_is_that_of_the_eigenvalues_and_integrates_to_their_number():
    d, width = SPECTRA["outliers"], 0.3
    grid = torch.linspace(-6, 13, 400, dtype=torch.float64)
    truth = torch.exp(-(((grid[:, None] - d) / width) ** 2) / 2).sum(1) / (width * math.sqrt(2 * math.pi))
    value, error = hessian_spectrum(products(rotated(d)), torch.zeros(SHAPE).double(), probes=16, steps=24).density(grid, width)
    assert value.shape == error.shape == grid.shape
    # 60 eigenvalues, of which probes see all but the outliers with a norm that is 60 up to its part in them.
    assert abs(float(torch.trapezoid(value, grid)) - N) < 0.05 * N
    assert torch.trapezoid((value - truth).abs(), grid) < 0.15 * N
    assert ((value - truth).abs() <= 4 * error + 0.02 * truth.max()).all()


def test_deflation_makes_the_error_of_outliers_small():
    d = SPECTRA["outliers"]
    H = rotated(d)
    plain = []
    for seed in range(8):
        z = torch.randint(0, 2, (N,), generator=gen(seed)).double() * 2 - 1
        plain.append((H @ z).square().sum())
    found = hessian_spectrum(products(H), torch.zeros(SHAPE).double(), probes=8, steps=16)
    raw = mean_of(torch.stack(plain))
    assert 2 * found.frobenius.value * found.frobenius.error < 0.1 * raw.error


def test_fp32_and_fp64_agree():
    H = rotated(SPECTRA["outliers"])
    narrow, wide = (
        hessian_spectrum(products(H.to(dtype)), torch.zeros(SHAPE, dtype=dtype), probes=3, steps=10)
        for dtype in (torch.float32, torch.float64)
    )
    assert narrow.values.dtype == torch.float64
    # Rounding may decide whether a Ritz vector beside the threshold counts as converged, which moves less than the error.
    assert (narrow.nuclear.value - wide.nuclear.value).abs() < 0.1 * wide.nuclear.error
    assert (narrow.operator.value - wide.operator.value).abs() < 1e-5 * wide.operator.value


def test_products_are_counted_as_stated():
    H, calls = rotated(SPECTRA["outliers"]), []

    def product(V):
        calls.append(V)
        return products(H)(V)

    like = torch.zeros(SHAPE).double()
    hessian_spectrum(product, like, probes=3, steps=7)
    assert len(calls) == 4 * 7
    calls.clear()
    block_masses(product, like, {"a": "rows", "b": "columns"}, probes=3, patterns=5, steps=6)
    assert len(calls) == 6 + 3 * (1 + 4 * 2)


@pytest.mark.parametrize("partition", ["rows", "columns", "given"])
def test_the_estimate_of_the_mass_is_unbiased(partition):
    H = rotated(SPECTRA["outliers"])
    given = torch.randint(5, 8, SHAPE, generator=gen(1)) if partition == "given" else partition
    truth = mass_within(H, SHAPE, given)
    found = block_mass(products(H), torch.zeros(SHAPE).double(), given, probes=1500, steps=4)
    assert found.error < 0.01
    assert (found.value - truth).abs() < 3.5 * found.error


def test_two_partitions_share_products_without_a_change():
    H, like = rotated(SPECTRA["low rank"]), torch.zeros(SHAPE).double()
    alone = block_mass(products(H), like, "rows", probes=3)
    both = block_masses(products(H), like, {"one": "rows", "two": "columns"}, probes=3)
    torch.testing.assert_close(both["one"].value, alone.value, atol=3 * float(alone.error), rtol=0)
    assert set(both) == {"one", "two"}


def test_a_network_has_the_masses_of_its_explicit_hessian():
    product, W, _ = network(steps=5)
    H = block_hessian(product, W)
    for name, (value, error) in block_masses(product, W, {"rows": "rows", "columns": "columns"}, probes=60).items():
        assert error < 0.05
        assert (value - mass_within(H, tuple(W.shape), name)).abs() < 4 * error


def test_deflation_makes_the_error_of_masses_small():
    product, W, _ = network(activation=nn.ReLU, steps=5)
    few, many = (block_mass(product, W, "rows", probes=8, steps=steps) for steps in (1, 20))
    assert many.error < 0.2 * few.error


def test_rows_of_several_matrices_are_parts_of_their_own():
    shape = (2, 3, 4)
    parts = torch.arange(6).repeat_interleave(4)
    H = rotated(torch.randn(24, generator=gen(0), dtype=torch.float64)) * (parts[:, None] == parts)
    value, error = block_mass(products(H, shape), torch.zeros(shape).double(), "rows")
    # 20 of 24 directions are known; signs of the other 4 decide little.
    assert error < 0.02
    assert (value - 1).abs() < 4 * error


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 8, 9, 30])
def test_the_widening_is_half_of_students_quantile(samples):
    t, freedom = 2 * widening(samples), samples - 1
    # Student's density, by quadrature.
    x = torch.linspace(0, t, 20001, dtype=torch.float64)
    height = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    held = 2 * torch.trapezoid(height * (1 + x.square() / freedom) ** (-(freedom + 1) / 2), x)
    assert float(held) == pytest.approx(math.erf(math.sqrt(2)), abs=1e-6)


def test_the_jackknife_takes_the_first_bias_out_of_a_ratio():
    draws = torch.rand(20000, 8, 2, generator=gen(0), dtype=torch.float64)
    over, under = 0.2 + draws[..., 0], 0.2 + draws[..., 1]
    plain = (over.mean(1) / under.mean(1)).mean() - 1
    mended = ratio_of(over.mT, under.mT).value.mean() - 1
    assert plain > 0.01
    assert mended.abs() < plain / 4


def test_what_is_left_of_a_probe_is_orthogonal_to_the_basis():
    H = rotated(SPECTRA["outliers"])
    run = look(products(H), torch.zeros(SHAPE).double(), 7, gen(0))
    z, rest = rest_of_probe(run.basis, torch.arange(7) < 5, gen(1))
    assert (run.basis[:5] @ rest).abs().max() < 1e-13
    torch.testing.assert_close(run.basis[5:] @ rest, run.basis[5:] @ z)
    T = tridiagonal(run.ritz, 7)
    torch.testing.assert_close(T[:6] @ run.basis, run.basis[:6] @ H)
    Y = run.vectors()
    torch.testing.assert_close((Y @ H * Y).sum(1), run.ritz.values)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda like: hessian_spectrum(torch.clone, like, probes=1), "probes must be at least 2"),
        (lambda like: hessian_spectrum(torch.clone, like, steps=1), "steps must be at least 2"),
        (lambda like: block_mass(torch.clone, like, probes=1), "at least 2 probes"),
        (lambda like: block_mass(torch.clone, like, patterns=1), "2 patterns"),
        (lambda like: block_mass(torch.clone, like, "heads"), "heads"),
        (lambda like: block_mass(torch.clone, like[0], "rows"), "rows"),
        (lambda like: block_mass(torch.clone, like, torch.zeros(3)), r"integers of shape \(6, 10\).*float32 of shape \(3,\)"),
        (lambda like: widening(1), "at least 2 independent samples"),
    ],
)
def test_what_has_no_error_bar_or_is_no_partition_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(SHAPE))


def test_a_diverged_run_gets_nan_and_no_exception():
    like = torch.ones(SHAPE)
    found = hessian_spectrum(lambda V: V * torch.nan, like, probes=2, steps=6)
    mass = block_mass(lambda V: V * torch.nan, like)
    assert found.nuclear.value.isnan() and found.effective_rank.value.isnan() and mass.value.isnan()
