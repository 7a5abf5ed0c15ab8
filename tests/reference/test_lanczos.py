"""Lanczos against the eigenvalues of explicit matrices: ends of the spectrum, quadrature, residuals, invariant spaces."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from schatten.diagnostics.lanczos import lanczos, largest_eigenvalue, shortfall


def symmetric(size, seed=0, dtype=torch.float64):
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((A + A.mT) / 2).to(dtype)


def times(H, shape=None):
    return lambda v: (H @ v.reshape(-1)).view(shape or v.shape)


def test_run_to_the_end_the_ritz_values_are_all_eigenvalues():
    H = symmetric(60)
    ritz = lanczos(times(H), torch.empty(6, 10, dtype=torch.float64), iterations=100)
    assert ritz.values.shape == (60,)
    # Rounding of the products, 60 times over.
    assert (ritz.values - torch.linalg.eigvalsh(H)).abs().max() < 1e-12
    assert ritz.weights.sum() == pytest.approx(1, abs=1e-12)


def test_the_tridiagonal_has_the_ritz_values_and_residuals_are_true():
    H = symmetric(80)
    like, start = torch.empty(80, dtype=torch.float64), torch.randn(80, dtype=torch.float64)
    ritz = lanczos(times(H), like, iterations=12, start=start)
    T = torch.diag(ritz.diagonal) + torch.diag(ritz.off_diagonal, 1) + torch.diag(ritz.off_diagonal, -1)
    assert torch.allclose(torch.linalg.eigvalsh(T), ritz.values)
    # The Krylov basis by QR, the slow way.
    vectors = [start / start.norm()]
    for _ in range(11):
        vectors.append(H @ vectors[-1])
        vectors[-1] /= vectors[-1].norm()
    Q = torch.linalg.qr(torch.stack(vectors, 1))[0]
    values, Y = torch.linalg.eigh(Q.mT @ H @ Q)
    assert torch.allclose(values, ritz.values, atol=1e-8)
    true = torch.linalg.vector_norm(H @ (Q @ Y) - (Q @ Y) * values, dim=0)
    assert torch.allclose(true, ritz.residuals, atol=1e-7)
    exact = torch.linalg.eigvalsh(H)
    nearest = (ritz.values[:, None] - exact).abs().amin(1)
    assert (nearest <= ritz.residuals + 1e-12).all()


@pytest.mark.parametrize("k", [1, 3, 6])
def test_weights_are_gausss_quadrature_exact_for_polynomials_below_twice_the_steps(k):
    H, start = symmetric(40) / 10, torch.randn(40, dtype=torch.float64)
    ritz = lanczos(times(H), start, iterations=k, start=start)
    v = start / start.norm()
    for degree in range(2 * k):
        assert float((ritz.weights * ritz.values**degree).sum()) == pytest.approx(
            float(v @ torch.linalg.matrix_power(H, degree) @ v), abs=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spectrum",
    [[0.0] * 12, [1.0] * 12, [3.0, 3.0, 1.0] + [0.0] * 9, [5.0] + [0.0] * 11, [-2.0, 2.0] + [1.0] * 10],
    ids=["zero", "identity", "two equal", "rank one", "both signs"],
)
def test_an_invariant_space_goes_on_with_a_fresh_direction(spectrum, dtype):
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    H = (Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ Q.mT).to(dtype)
    ritz = lanczos(times(H), torch.empty(12, dtype=dtype), iterations=12)
    # Multiplicities are found too, which a single Krylov space cannot.
    close = 12 * 50 * torch.finfo(dtype).eps
    assert (ritz.values - torch.tensor(spectrum).double().sort().values).abs().max() < close
    assert ritz.weights.sum() == pytest.approx(1, abs=1e-6)


def test_copies_of_converged_eigenvalues_do_not_appear():
    # A large gap makes the top converge at once, after which rounding would bring it back without reorthogonalisation.
    d = torch.cat([torch.linspace(0, 1, 199), torch.tensor([100.0])]).double()
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        ritz = lanczos(lambda v: d.to(v) * v, d.to(dtype), iterations=60)
        assert (ritz.values > 50).sum() == 1 and float(ritz.values[-1]) == pytest.approx(100, rel=1e-6)
        assert ritz.values[-2] < 1 + close and ritz.values[0] > -close


def test_several_tensors_are_one_vector():
    H = symmetric(16)
    shapes = [(2, 3), (10,)]
    like = [torch.empty(s, dtype=torch.float64) for s in shapes]

    def product(vectors):
        assert [tuple(v.shape) for v in vectors] == shapes
        flat = H @ torch.cat([v.reshape(-1) for v in vectors])
        return tuple(piece.view(s) for piece, s in zip(flat.split([6, 10]), shapes, strict=True))

    whole = lanczos(times(H), torch.empty(16, dtype=torch.float64), iterations=5, seed=3)
    for a, b in zip(lanczos(product, like, iterations=5, seed=3), whole, strict=True):
        assert torch.allclose(a, b)


def test_half_precision_gets_vectors_in_fp32():
    seen = []

    def product(v):
        seen.append(v.dtype)
        return 2 * v.bfloat16()

    assert largest_eigenvalue(product, torch.empty(4, 4, dtype=torch.bfloat16), 3).value == pytest.approx(2, rel=1e-2)
    assert set(seen) == {torch.float32}


def test_a_seed_is_a_start_and_leaves_the_global_generator_alone():
    H = symmetric(30)
    state = torch.get_rng_state()
    one, same, other = (lanczos(times(H), H[0], 4, seed=s).values for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sign", [1, -1])
def test_l_is_the_largest_in_size_whatever_its_sign_and_from_below(sign):
    H = sign * (symmetric(50) + 3 * torch.eye(50, dtype=torch.float64))
    exact = torch.linalg.eigvalsh(H).abs().max()
    for k in (2, 5, 10, 50):
        L = largest_eigenvalue(times(H), H[0], k)
        assert L.value <= exact * (1 + 1e-12)
        assert (torch.linalg.eigvalsh(H).abs() - L.value).abs().min() <= L.error * (1 + 1e-9)
    assert float(L.value) == pytest.approx(float(exact), rel=1e-12)


class Reads(TorchDispatchMode):
    """How often a number was read out of a tensor, which on a GPU waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("d", [torch.linspace(-3, 1, 30), torch.ones(30)], ids=["spread", "invariant"])
def test_no_number_is_read_from_the_device(d):
    with Reads() as reads:
        largest_eigenvalue(lambda v: d * v, d)
        assert reads.count == 0
        float(d[0])
    assert reads.count == 1


SPECTRA = {
    "flat": torch.linspace(0, 1, 300),
    # Crowded at the end that is sought, which is hard.
    "crowded": 1 - torch.linspace(0, 1, 300) ** 2,
    "both signs": torch.linspace(-1, 1, 300),
    "outlier": torch.cat([torch.rand(299, generator=torch.Generator().manual_seed(0)) * 0.9, torch.ones(1)]),
    "chebyshev": torch.cos(torch.linspace(0, math.pi, 300)),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("k", "failure"), [(6, 0.3), (10, 0.05)])
def test_the_shortfall_of_kuczynski_and_wozniakowski_covers_the_truth_as_often_as_it_says(spectrum, k, failure):
    d = SPECTRA[spectrum].double()
    exact = float(d.abs().max())
    runs = 200
    covered = sum(
        exact <= shortfall(300, k, failure) * float(largest_eigenvalue(lambda v: d * v, d, k, seed=seed).value)
        for seed in range(runs)
    )
    # A bound for the worst spectrum: never fewer than it says, less three standard errors of the binomial.
    assert covered >= runs * (1 - failure) - 3 * math.sqrt(runs * failure * (1 - failure))


def test_the_shortfall_can_fail_where_it_is_planted_too_small():
    d = SPECTRA["chebyshev"].double()
    misses = [1 - float(largest_eigenvalue(lambda v: d * v, d, 10, seed=seed).value) for seed in range(50)]
    assert min(misses) > 0 and max(misses) > 0.005
    assert shortfall(300, 10) > 1 / (1 - max(misses))


def test_the_shortfall_ends_at_one_and_falls_with_iterations():
    values = [shortfall(8192, k) for k in (2, 10, 20, 40, 8192)]
    assert values[0] == math.inf and values[-1] == 1.0
    assert values == sorted(set(values), reverse=True)


def test_what_is_not_finite_gives_nan_and_nonsense_is_refused():
    assert largest_eigenvalue(lambda v: v * torch.inf, torch.empty(3, 3), 4).value.isnan()
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        lanczos(lambda v: v, torch.empty(3), 0)
    with pytest.raises(ValueError, match="must have entries"):
        lanczos(lambda v: v, torch.empty(0, 3))
