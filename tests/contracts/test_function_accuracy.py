"""`spectral_power`, `apply_map` and the solvers under them keep their stated errors over the zoo, along singular vectors."""

import dataclasses
import math

import pytest
import torch

import schatten
from schatten import maps, solvers
from schatten.solvers.power_function import PowerFunction
from tests.contracts.matrices import ZOO, gaussian, spectral_norm, with_spectrum

FLOOR = 1e-3  # errors are promised from this part of the largest singular value on

# Two matrices whose spectra end at the floor, so that the whole range is visited.
RANGE = {
    "log-uniform to the floor, wide": with_spectrum(60, 200, torch.logspace(0, -3, 60), seed=20),
    "log-uniform to the floor, square": with_spectrum(90, 90, torch.logspace(0, -3, 90), seed=21),
}
MATRICES = {**ZOO, **RANGE}


def errors(G, D, h, floor=FLOOR):
    """Largest relative error of the gains against h(sigma), for sigma >= floor of the largest, and the largest leak from one
    direction into another relative to the largest h. Of the fp32 matrix, as that is what solvers see."""
    G, D = G.double(), D.double()
    unit = G.abs().max()
    U, s, Vh = torch.linalg.svd(G / unit, full_matrices=False)
    s = s * unit
    kept = s >= floor * s[0] * (1 - 1e-6)
    M = (U.mT @ D @ Vh.mT)[kept][:, kept]
    expected = h(s[kept])
    gain = M.diagonal()
    largest = expected.abs().max()
    return float((gain / expected - 1).abs().max()), spectral_norm((M - torch.diag(gain)) / largest)


@pytest.mark.parametrize("p", [-0.9, -0.75, -0.5, -0.25, -0.1, 0.0, 0.03, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("name", MATRICES)
def test_a_spectral_power_is_within_two_percent_in_fp32(name, p):
    G = MATRICES[name].float()
    relative, _ = errors(G, schatten.spectral_power(G, p), lambda s: s**p)
    assert relative <= 0.02


@pytest.mark.parametrize("p", [-0.9, -0.5, 0.0, 0.5])
@pytest.mark.parametrize("name", RANGE)
def test_a_spectral_power_in_fp64_leaks_nothing_and_has_the_error_of_its_fit(name, p):
    G = RANGE[name]
    relative, leak = errors(G, schatten.spectral_power(G, p), lambda s: s**p)
    # Rounding 1e-16, amplified by weights up to 2e3 and, relative to the largest output, nothing else.
    assert 0.005 < relative <= 0.02 and leak < 1e-11


# What half-precision iterates add, measured over the zoo at twice the maxima: the relative error for sigma above 1e-2 and
# 1e-3 of the largest. Directions below the floor are not promised: the cast alone is noise of 0.4 % of the norm.
HALF = {torch.float16: (0.025, 0.035), torch.bfloat16: (0.05, 0.14)}


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", RANGE)
def test_half_precision_adds_what_is_documented(name, dtype, p):
    G = RANGE[name].float()
    D = schatten.spectral_power(G, p, dtype=dtype)
    for floor, bound in zip((1e-2, 1e-3), HALF[dtype], strict=True):
        assert errors(G, D, lambda s: s**p, floor)[0] <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_no_spectrum_breaks_a_power_in_any_precision(name, dtype):
    G = (MATRICES[name] / torch.linalg.matrix_norm(MATRICES[name] / MATRICES[name].abs().max(), 2)).float()
    G = G / G.abs().max()
    for p in (0.0, 0.5):
        D = schatten.spectral_power(G, p, dtype=dtype).double()
        largest = spectral_norm(G.double()) ** p
        # 2 % of the fit, and rounding, which at p = 0 in bf16 is up to 15 % for sigma near 1e-3 of the largest.
        assert D.isfinite().all() and spectral_norm(D) < 1.2 * largest


@pytest.mark.parametrize("p", [-0.5, 0.25, 0.5])
@pytest.mark.parametrize("c", [1e-25, 1e-3, 1e3, 1e25])
def test_a_factor_comes_out_to_the_power_p(c, p):
    G = gaussian(20, 30).float()
    # fp32 rounding of c^p and of G c, 1e-7 each, times the slope of the fits, 30 at most.
    torch.testing.assert_close(
        schatten.spectral_power(c * G, p), c**p * schatten.spectral_power(G, p), rtol=5e-5, atol=5e-6 * c**p
    )


SMOOTH = [
    *(maps.Power(p) for p in (0.05, 0.25, 0.5, 1.0)),
    *(cls(a) for cls in (maps.PseudoHuber, maps.LogCosh, maps.LogSmoothed) for a in (1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 30.0)),
    maps.LogCosh(0.01, relative="frobenius"),
    maps.PseudoHuber(0.1, relative="frobenius"),
]


@pytest.mark.parametrize("K", SMOOTH, ids=lambda K: f"{type(K).__name__} {getattr(K, 'p', K.a):g} {K.relative or ''}")
@pytest.mark.parametrize("name", RANGE)
def test_every_smooth_map_is_within_two_percent_in_fp32(name, K):
    G = RANGE[name].float()
    exact = K.threshold(G.double())
    assert errors(G, schatten.apply_map(G, K), lambda s: K.h(s, exact))[0] <= 0.02


@pytest.mark.parametrize("p", [1.1, 1.5, 1.9, 2.0, 2.1, 2.5, 3.0, 4.0])
def test_a_schatten_norm_by_the_tower_is_its_own_direction_or_refused(p):
    try:
        K = maps.Schatten(p, solver=solvers.tower(dtype="float32"))
    except ValueError as error:
        assert p > 2 and "use svd()" in str(error)
        return
    for G in RANGE.values():
        exact = maps.Schatten(p, solver=solvers.svd()).grad(G)
        difference = torch.linalg.matrix_norm(K.grad(G.float()).double() - exact) / torch.linalg.matrix_norm(exact)
        # 2 % of each direction and of the norm; above p = 2 up to the worst fit that is not refused, twice.
        assert float(difference) <= (0.04 if p <= 2 else 0.3)


@pytest.mark.parametrize("a", [1e-3, 0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("cls", [maps.Huber, maps.Clip])
def test_a_kink_costs_eleven_percent(cls, a):
    for G in RANGE.values():
        K = cls(a)
        assert errors(G.float(), schatten.apply_map(G.float(), K), lambda s, K=K: K.h(s, K.a))[0] <= 0.11


@pytest.mark.parametrize(("a", "bound"), [(1e-3, 0.01), (0.05, 0.01), (0.1, 0.011), (0.3, 0.07), (0.9, 0.07), (1.5, 0.07)])
def test_a_soft_threshold_is_off_by_a_share_of_the_largest_singular_value(a, bound):
    for G in RANGE.values():
        exact = maps.SoftThreshold(a, solver=solvers.svd()).grad(G)
        D = schatten.apply_map(G.float(), maps.SoftThreshold(a)).double()
        assert spectral_norm(D - exact) < bound


def test_a_spectral_threshold_follows_the_largest_singular_value():
    # The estimate of sigma_max is low by up to 4 % here (`spectral_norm`), which moves the threshold by as much.
    for G in (*RANGE.values(), gaussian(80, 80)):
        K = maps.LogCosh(0.1, relative="spectral")
        exact = K.threshold(G)
        assert errors(G.float(), schatten.apply_map(G.float(), K), lambda s, K=K, a=exact: K.h(s, a))[0] <= 0.06


@pytest.mark.parametrize("count", [1, 3])
def test_krylov_finds_leading_directions_where_they_are_determined(count):
    # Singular values fall by a fifth after each: block Krylov converges as (s_{k+1}/s_k)^(2 blocks) at least.
    G = with_spectrum(90, 70, 0.8 ** torch.arange(70.0))
    exact = maps.KyFan(count, solver=solvers.svd()).grad(G)
    assert spectral_norm(schatten.apply_map(G.float(), maps.KyFan(count)).double() - exact) < 1e-3
    for name, flat in {"Gaussian": gaussian(100, 100), **RANGE}.items():
        D = maps.KyFan(count).grad(flat.float()).double()
        best = float(torch.linalg.svdvals(flat)[:count].sum())
        assert 0.97 * best < float((D * flat).sum()) <= best * (1 + 1e-5), name
        s = torch.linalg.svdvals(D)
        assert (s[:count] - 1).abs().max() < 1e-4 and s[count] < 1e-4


@pytest.mark.parametrize("p", [0.5, 0.25, 0.125, -0.5, -0.25])
@pytest.mark.parametrize("name", RANGE)
def test_coupled_minimax_is_within_1e_4(name, p):
    solver = solvers.coupled_minimax()
    G = RANGE[name].float()
    # fp32 rounding of some fifty products, 6e-8 each, times the condition of H, 1e3.
    assert errors(G, solver.apply(G, PowerFunction(p)), lambda s: s**p)[0] < 1e-4
    assert errors(RANGE[name], solver.apply(RANGE[name], PowerFunction(p)), lambda s: s**p)[0] < 1e-5


FUNCTION_SOLVERS = [
    (solvers.svd(), maps.Power(0.5)),
    (solvers.tower(dtype="float32"), maps.Power(0.5)),
    (solvers.tower(dtype="float32"), maps.LogCosh(0.3)),
    (solvers.coupled_newton(), maps.Power(0.5)),
    (solvers.coupled_minimax(), maps.Power(0.25)),
    (solvers.krylov(), maps.KyFan(2)),
]


@pytest.mark.parametrize(("solver", "K"), FUNCTION_SOLVERS, ids=lambda x: repr(x)[:30])
class TestEveryFunctionSolver:
    def test_zero_gives_zero_and_empty_stays_empty(self, solver, K):
        assert solver.apply(torch.zeros(3, 4), K).count_nonzero() == 0
        for shape in ((0, 5), (3, 0, 4), (0, 4, 4)):
            assert solver.apply(torch.zeros(shape), K).shape == shape

    def test_a_batch_is_its_matrices(self, solver, K):
        X = gaussian(2, 3, 9, 14).float()
        singles = torch.stack([torch.stack([solver.apply(x, K) for x in row]) for row in X])
        torch.testing.assert_close(solver.apply(X, K), singles, rtol=0, atol=2e-5)
        torch.testing.assert_close(solver.apply(X.mT, K), singles.mT, rtol=0, atol=2e-5)

    def test_inputs_are_only_read_and_dtypes_kept(self, solver, K):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            X = gaussian(6, 9).to(dtype)
            before = X.clone()
            assert solver.apply(X, K).dtype == dtype and torch.equal(X, before)

    def test_a_non_finite_matrix_shows_and_spreads_nowhere(self, solver, K):
        X = gaussian(3, 9, 14).float()
        good = solver.apply(X, K)
        for bad in (torch.nan, torch.inf):
            X[1, 2, 3] = bad
            D = solver.apply(X, K)
            assert not D[1].isfinite().all()
            torch.testing.assert_close(D[[0, 2]], good[[0, 2]], rtol=0, atol=2e-5)

    def test_equal_calls_are_bitwise_equal(self, solver, K):
        X = gaussian(40, 60).float()
        assert torch.equal(solver.apply(X, K), solver.apply(X, K))

    def test_it_is_a_value(self, solver, K):
        assert eval(repr(solver), vars(solvers)) == solver and isinstance(solver, solvers.FunctionSolver)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: schatten.spectral_power(torch.eye(2), -1.0), r"spectral_power needs -0.9 <= p <= 1, got p=-1.0"),
        (lambda: schatten.spectral_power(torch.eye(2), math.nan), "got p=nan"),
        (lambda: schatten.spectral_power(torch.eye(2), "half"), "got p='half'"),
        (
            lambda: schatten.spectral_power(torch.eye(2), -0.9, dtype=torch.float16),
            "float16 cannot hold .* Use dtype='float32'",
        ),
        (lambda: schatten.spectral_power(torch.zeros(3), 0.5), r"G must be a matrix or a batch .* got shape \(3,\)"),
        (lambda: schatten.apply_map(torch.eye(2), maps.Huber), "map must be a map of schatten.maps, such as"),
        (lambda: schatten.apply_map(torch.zeros(3), maps.Huber(0.1)), r"G must be a matrix"),
        (lambda: solvers.fit(lambda s: s**-0.9, steps=8, dtype="bfloat16"), "bfloat16 cannot hold .* Use dtype='float32'"),
        (lambda: solvers.fit(lambda s: s - 1), "h must be finite and not negative"),
        (lambda: solvers.fit(torch.sqrt, steps=5), r"steps must be one of \[7, 8\], the lengths of the towers, got 5"),
        (lambda: solvers.fit(torch.sqrt, lower=0.0), r"lower must lie in \(0, 1\)"),
        (lambda: solvers.fit(torch.sqrt, error="mean"), "error must be 'relative' or 'absolute'"),
        (lambda: solvers.fit(lambda s: (s - 0.5).clamp(min=0)), "relative error needs h > 0"),
        (
            lambda: solvers.coupled_newton().apply(torch.eye(2), maps.Power(0.3)),
            r"computes Power\(0.5\) and Power\(0.25\) only",
        ),
        (lambda: solvers.coupled_minimax().apply(torch.eye(2), maps.Power(0.3)), "computes powers"),
        (lambda: solvers.coupled_minimax(lower=2.0), r"lower must lie in \(0, 1\), got 2.0"),
        (lambda: solvers.krylov(blocks=0), "steps must be at least 1"),
        (lambda: solvers.muon_p("2/3"), r"p must be one of '1/2', .* any other power is spectral_power"),
        (lambda: solvers.newton_schulz("you"), "schedule must be one of 'keller', 'polar-express', 'cans' or quintics"),
        (lambda: solvers.newton_schulz("cans", steps=6), "steps must be at most 5, the length of this schedule, got 6"),
        (lambda: solvers.newton_schulz([(2.0, -1.5, 0.5)], steps=2), "pass as many as you want"),
        (lambda: solvers.newton_schulz([]), "at least one quintic"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_way_out(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


def test_apply_map_sets_every_open_precision_inside_a_map():
    K = 2 * maps.LogCosh(0.1) + maps.Nuclear()
    G = gaussian(30, 40).float()
    fp32 = 2 * maps.LogCosh(0.1, solver=solvers.tower(dtype="float32")) + maps.Nuclear(solvers.polynomial(dtype="float32"))
    assert torch.equal(schatten.apply_map(G, K), fp32.grad(G))
    assert dataclasses.fields(maps.Nuclear) and torch.equal(schatten.apply_map(G, fp32), fp32.grad(G))


@pytest.mark.parametrize(
    "f",
    [
        schatten.polar,
        lambda G: schatten.polar(G.mT),
        lambda G: schatten.spectral_power(G, 0.5),
        lambda G: schatten.apply_map(G, maps.LogCosh(0.5)),
        lambda G: maps.Frobenius().grad(G),
    ],
    ids=["polar", "polar of the transpose", "power", "map", "Frobenius"],
)
@pytest.mark.parametrize("shape", [(4, 4), (3, 12)])
def test_derivatives_are_those_of_the_function(f, shape):
    # Buffers are reused between products only where autograd does not need them.
    G = gaussian(*shape, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(f, (G,), atol=1e-4, rtol=1e-3)
