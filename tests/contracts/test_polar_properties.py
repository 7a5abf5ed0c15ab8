"""`polar` over random shapes, ranks, spectra and scales: what hypothesis cannot break, with fixed seeds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schatten import polar
from tests.contracts.matrices import gaussian, orthonormal, read, spectral_norm, with_spectrum

TRIALS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def matrices(draw):
    """m x n of rank r with singular values from 1 down to 1e-4 in any order, times any scale fp32 holds."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    r = draw(st.integers(1, min(m, n)))
    exponents = draw(st.lists(st.floats(-4, 0), min_size=r, max_size=r))
    scale = 10.0 ** draw(st.integers(-30, 30))
    return with_spectrum(m, n, 10.0 ** torch.tensor(exponents, dtype=torch.float64), seed=draw(st.integers(0, 99))) * scale


@TRIALS
@given(matrices())
def test_the_default_band_holds(G):
    reading = read(G, polar(G.float()))
    assert (reading.above(1e-3).gain - 1).abs().max() <= 0.16
    # fp32 rounding and the rounding of G to fp32, 6e-8, in a gain of 8e2 and a matrix of at most 24 directions.
    assert reading.gain.min() > -5e-4 and reading.gain.max() < 1.16
    assert spectral_norm(reading.mixed) < 5e-4 and spectral_norm(reading.outside) < 5e-4


@TRIALS
@given(matrices(), st.sampled_from([1e-2, 1e-3]))
def test_a_tolerance_is_kept(G, tol):
    assert (read(G, polar(G.float(), tol=tol)).above(1e-3).gain - 1).abs().max() <= tol


@TRIALS
@given(matrices(), st.integers(0, 99))
def test_rotating_the_input_rotates_the_output(G, seed):
    # In fp64, so that rotating itself rounds by 1e-16 of the largest entry, against a smallest gain range of 8e2.
    Q, R = orthonormal(G.shape[0], G.shape[0], seed), orthonormal(G.shape[1], G.shape[1], seed + 1)
    assert (polar(Q @ G @ R) - Q @ polar(G) @ R).abs().max() < 1e-11


@TRIALS
@given(matrices(), st.floats(-1, 1).filter(lambda t: abs(t) > 1e-3))
def test_a_factor_leaves_its_sign_only(G, t):
    sign = 1 if t > 0 else -1
    assert (polar(t * G) - sign * polar(G)).abs().max() < 1e-11


@TRIALS
@given(matrices())
def test_it_never_ascends(G):
    X = G.float()
    assert float((polar(X).double() * X.double()).sum() / X.double().norm()) > 0.8  # one direction at least has all its gain


@TRIALS
@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 5), st.integers(0, 5), st.integers(0, 99))
def test_any_batch_shape_is_the_batch_of_its_matrices(batch, m, n, seed):
    X = gaussian(*batch, m, n, seed=seed)
    P = polar(X)
    assert P.shape == X.shape and P.dtype == X.dtype
    for x, p in zip(X.reshape(-1, m, n) if X.numel() else [], P.reshape(-1, m, n) if X.numel() else [], strict=True):
        # Small Gaussians may be nearly singular: fp64 rounding times a gain of at most 8e2.
        assert (polar(x) - p).abs().max() < 1e-11


def test_polar_can_be_differentiated():
    # <polar(G), G> of a square orthogonal factor is the nuclear norm, whose gradient is the polar factor itself (up to the
    # band): the derivative of polar in that direction vanishes, so the two parts of the product rule leave polar(G).
    torch.manual_seed(0)
    G = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    (polar(G, tol=1e-8) * G).sum().backward()
    U, _, Vh = torch.linalg.svd(G.detach())
    # The derivative of a composition accurate to 1e-8 is accurate to about its square root.
    torch.testing.assert_close(G.grad, U @ Vh, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-45, 3e-45, 1e-42, 1e-39, 1e-38])
def test_denormal_matrices_give_directions_inside_the_band(value, dtype):
    """Divided by a norm that has lost its last bits a row of 1e-45 was 1.12 long, and the polynomial gave nan."""
    D = polar(torch.full((1, 5), value), dtype=dtype)
    assert D.isfinite().all() and torch.linalg.vector_norm(D) <= 1.17
