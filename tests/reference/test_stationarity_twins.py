"""The KKT score, the Frank-Wolfe gap and V_K against the paper's equations, literally: its signs, one matrix, SVDs in fp64."""

import math

import pytest
import torch

from schatten import maps, solvers
from schatten.diagnostics.lyapunov import lyapunov, lyapunov_change_bound, lyapunov_constant
from schatten.diagnostics.stationarity import frank_wolfe_gap, kkt_residual
from tests.contracts.map_laws import instances
from tests.contracts.matrices import with_spectrum
from tests.reference.twins import polar, spectral

SVD = solvers.svd()

F64 = torch.float64

SHAPES = [(5, 3), (3, 7), (4, 4)]

# fp64 rounding of sums of some twenty products.
PRECISION = 1e-12


def svdvals(X):
    return torch.linalg.svdvals(X)


def nuc(X):
    return svdvals(X).sum()


# K, its gradient, K* in its domain and where the domain ends (the spectral norm), of one matrix; and the library's map.
TABLE = {
    "nuclear": (maps.Nuclear(SVD), nuc, polar, lambda Y: 0 * nuc(Y), 1.0),
    "huber": (
        maps.Huber(0.3, solver=SVD),
        lambda X: sum(s * s / 0.6 if s <= 0.3 else s - 0.15 for s in svdvals(X)),
        lambda X: spectral(X, lambda s: (s / 0.3).clamp(max=1)),
        lambda Y: 0.15 * svdvals(Y).square().sum(),
        1.0,
    ),
    "half power": (
        maps.Power(0.5, solver=SVD),
        lambda X: svdvals(X).pow(1.5).sum() / 1.5,
        lambda X: spectral(X, torch.sqrt),
        lambda Y: svdvals(Y).pow(3).sum() / 3,
        math.inf,
    ),
    "soft threshold": (
        maps.SoftThreshold(0.2, solver=SVD),
        lambda X: (svdvals(X) - 0.2).clamp(min=0).square().sum() / 2,
        lambda X: spectral(X, lambda s: (s - 0.2).clamp(min=0)),
        lambda Y: svdvals(Y).square().sum() / 2 + 0.2 * nuc(Y),
        math.inf,
    ),
    "clip": (
        maps.Clip(0.7, solver=SVD),
        lambda X: sum(s * s / 2 if s <= 0.7 else 0.7 * s - 0.245 for s in svdvals(X)),
        lambda X: spectral(X, lambda s: s.clamp(max=0.7)),
        lambda Y: svdvals(Y).square().sum() / 2,
        0.7,
    ),
}


def drawn(shape, norm, decay, c, end):
    """W with lambda W / c of spectral norm `norm` times where the domain ends, and a gradient."""
    W = torch.randn(shape, dtype=F64)
    length = norm * (end if end < math.inf else 1.0) * c / decay
    return W * length / torch.linalg.matrix_norm(W, ord=2), torch.randn(shape, dtype=F64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("name", TABLE)
def test_the_residual_equals_its_formula_for_each_k_with_a_shape_factor(name, norm, shape):
    K, value, _, conjugate, end = TABLE[name]
    decay, c = 0.3, 1.7
    W, G = drawn(shape, norm, decay, c, end)
    residual, violation = kkt_residual(K, W, G, decay, c)
    expected = c * value(-G) + c * conjugate(decay * W / c) + (decay * W * G).sum()
    assert residual.item() == pytest.approx(float(expected), abs=PRECISION)
    assert violation == 0 and residual >= -PRECISION
    assert frank_wolfe_gap(K, W, G, decay, c).item() == pytest.approx(float(expected) / decay, abs=PRECISION / decay)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.5, 30.0])
def test_muons_residual_is_the_papers_score_everywhere_and_its_violation_the_excess_over_the_radius(norm):
    decay, c = 0.3, 1.7
    W, G = drawn((5, 3), norm, decay, c, 1.0)
    residual, violation = kkt_residual(maps.Nuclear(SVD), W, G, decay, c)
    assert residual.item() == pytest.approx((c * nuc(G) + (decay * W * G).sum()).item(), abs=1e-11)
    assert violation.item() == pytest.approx(max(norm - 1, 0), abs=PRECISION)


@pytest.mark.parametrize("name", ["huber", "clip"])
def test_outside_k_star_counts_at_the_multiple_of_the_weight_on_the_boundary(name):
    K, value, _, conjugate, end = TABLE[name]
    decay, c = 0.3, 1.7
    W, G = drawn((5, 3), 2.5, decay, c, end)
    residual, violation = kkt_residual(K, W, G, decay, c)
    on_boundary = decay * W / c / 2.5
    expected = c * value(-G) + c * conjugate(on_boundary) + (decay * W * G).sum()
    # The multiple is 1e-12 short of the boundary.
    assert residual.item() == pytest.approx(float(expected), abs=1e-10)
    assert violation.item() == pytest.approx(1.5 * end, abs=PRECISION)


@pytest.mark.parametrize("name", TABLE)
def test_where_lambda_w_is_the_direction_the_residual_is_zero(name):
    K, _, grad, _, _ = TABLE[name]
    decay, c = 0.3, 1.7
    for shape in SHAPES:
        G = torch.randn(shape, dtype=F64)
        residual, violation = kkt_residual(K, -c * grad(G) / decay, G, decay, c)
        assert abs(residual.item()) < PRECISION * 10 and violation.item() < PRECISION


def test_the_gap_is_the_most_that_a_linear_function_falls_on_the_ball():
    decay, c = 0.3, 1.7
    W, G = drawn((5, 3), 0.8, decay, c, 1.0)
    lowest = min(((X * G).sum().item() for X in vertices(G, 400)), default=0.0) * c / decay
    gap = frank_wolfe_gap(maps.Nuclear(SVD), W, G, decay, c).item()
    assert gap == pytest.approx((W * G).sum().item() - lowest, abs=1e-10)


def vertices(G, count):
    """Polar factors, the corners of the unit spectral ball, at random and the lowest."""
    return [*(polar(torch.randn(*G.shape, dtype=F64)) for _ in range(count)), -polar(G)]


# The conjugate of this sum is slow to find to find.
SLOW = ("Huber + L1 rows",)


@pytest.mark.parametrize("name", [name for name in instances() if name not in SLOW])
def test_the_residual_of_every_map_is_finite_and_not_negative_inside_and_zero_at_rest(name):
    K, decay, c = instances()[name], 0.3, 1.7
    sums = isinstance(K, maps.Sum)
    G = torch.randn(2, 5, 4, dtype=F64)
    at_rest = -c * K.grad(G) / decay
    residual, violation = kkt_residual(K, at_rest, G, decay, c)
    # Found by iteration for sums.
    near = 1e-5 if sums else 1e-10
    assert (residual.abs() < near * c * K.value(G)).all() and (violation < near).all()
    residual, violation = kkt_residual(K, 0.5 * at_rest, G, decay, c)
    assert (residual > -near).all() and (violation < near).all()
    if not sums:
        assert kkt_residual(K, 100 * at_rest, G, decay, c)[0].isfinite().all()


def test_a_batch_is_its_matrices():
    W, G = torch.randn(2, 2, 3, 5, 4, dtype=F64).unbind(0)
    for K in (maps.Nuclear(SVD), maps.Huber(0.3), maps.L1(over="rows"), maps.Frobenius()):
        batch = torch.stack(kkt_residual(K, W, G, 0.3, 1.7))
        assert batch.shape == (2, 2, 3)
        for i in range(2):
            for j in range(3):
                one = torch.stack(kkt_residual(K, W[i, j], G[i, j], 0.3, 1.7))
                torch.testing.assert_close(batch[:, i, j], one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_fp64(dtype):
    W, G = torch.randn(2, 8, 6).to(dtype).unbind(0)
    exact = kkt_residual(maps.Nuclear(SVD), W.double(), G.double(), 0.3)
    assert torch.equal(torch.stack(kkt_residual(maps.Nuclear(SVD), W, G, 0.3)), torch.stack(exact))


SPECTRA = {
    "Gaussian": lambda: torch.randn(64, 48),
    "decaying to 1e-3": lambda: with_spectrum(64, 48, torch.logspace(0, -3, 48)).float(),
    "decaying to 1e-6": lambda: with_spectrum(64, 48, torch.logspace(0, -6, 48)).float(),
    "rank three": lambda: with_spectrum(64, 48, torch.tensor([3.0, 2.0, 1.0])).float(),
    "zero": lambda: torch.zeros(64, 48),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("delta", [0.1, 1e-3])
def test_one_polar_factor_gives_the_residual_within_its_stated_error(name, delta):
    G, W = SPECTRA[name](), torch.randn(64, 48) / 50
    lower = 1e-4
    cheap = kkt_residual(maps.Nuclear(SVD), W, G, 0.3, 1.7, solver=solvers.polynomial(tol=delta, lower=lower, dtype="float32"))
    exact = kkt_residual(maps.Nuclear(SVD), W, G, 0.3, 1.7)
    s = svdvals(G.double())
    small = int((s < lower * s.norm()).sum())
    # And fp32 rounding of the products, 1e-6 of the largest singular values.
    bound = 1.7 * (delta * s.sum() + lower * small * s.norm() + 1e-5 * s.sum())
    assert (cheap[0] - exact[0]).abs() <= bound
    assert cheap[1] <= exact[1] + 1e-6


def test_what_no_residual_is_of_is_refused():
    W = torch.zeros(3, 2)
    for bad, words in (({"grad": W.T}, "one shape"), ({"weight_decay": -1.0}, "at least 0"), ({"factor": 0.0}, "positive")):
        with pytest.raises(ValueError, match=words):
            kkt_residual(**{"map": maps.Nuclear(), "weight": W, "grad": W, "weight_decay": 0.1, **bad})
    with pytest.raises(ValueError, match="weight_decay > 0"):
        frank_wolfe_gap(maps.Nuclear(), W, W, 0.0)
    with pytest.raises(ValueError, match="fixed threshold"):
        kkt_residual(maps.Huber(0.3, relative="frobenius"), W, W, 0.1)


# -- V_K, with the paper's M, which averages the negative gradient -------------------------------------------------------


@pytest.mark.parametrize("form", ["implicit", "explicit"])
@pytest.mark.parametrize("name", TABLE)
def test_v_k_and_its_bound_equal_the_papers_signs(name, form):
    K, value, grad, conjugate, end = TABLE[name]
    decay, c, lr, L, (beta1, beta2) = 0.3, 1.7, 0.05, 3.0, (0.7, 0.9)
    for shape in SHAPES:
        X, M = drawn(shape, 0.8, decay, c, end)
        g = torch.randn(shape, dtype=F64)
        numbers = (lr, decay, (beta1, beta2), c)

        def gap(X, M):
            return c * value(M) + c * conjugate(decay * X / c) - (decay * X * M).sum()

        # An explicit step moves by lr (D - lambda X), an implicit one by eta (D - lambda X+).
        N, after = beta1 * M - (1 - beta1) * g, beta2 * M - (1 - beta2) * g
        D = c * grad(N)
        ahead = X + lr * (D - decay * X) if form == "explicit" else (X + lr * D) / (1 + lr * decay)
        eta = lr / (1 - lr * decay) if form == "explicit" else lr
        C = eta * beta1 / ((1 - beta2) + eta * decay * (1 - beta1))
        assert lyapunov_constant(*numbers[:3], decay=form) == pytest.approx(C, rel=1e-14)

        V = 2.5 - 1.0 + c * conjugate(decay * X / c) / decay + C * gap(X, M)
        assert lyapunov(K, X, -M, 2.5, *numbers, minimum=1.0, decay=form).item() == pytest.approx(float(V), abs=1e-11)

        residual = -eta * (1 + decay * C) * gap(ahead, N)
        monotone = -C * (1 - beta2) / (beta2 - beta1) * ((after - N) * c * (grad(after) - grad(N))).sum()
        curvature = L * eta**2 / 2 * (D - decay * ahead).square().sum()
        bound = lyapunov_change_bound(K, X, -M, g, L, *numbers, decay=form)
        for term, expected in zip(bound, (residual, monotone, curvature), strict=True):
            assert term.item() == pytest.approx(float(expected), abs=1e-11)
        assert bound.total.item() == pytest.approx(float(residual + monotone + curvature), abs=1e-11)


def test_without_decay_v_k_is_the_loss_and_c_times_the_length_of_the_momentum():
    W, M = torch.randn(2, 5, 3, dtype=F64).unbind(0)
    V = lyapunov(maps.Nuclear(SVD), W, M, 2.0, 0.1, 0.0, (0.5, 0.9))
    assert V.item() == pytest.approx(2.0 + 0.1 * 0.5 / 0.1 * nuc(M).item())
