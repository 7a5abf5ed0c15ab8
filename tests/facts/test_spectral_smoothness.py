"""Spectral smoothness between its bounds: what is known of Kronecker Hessians, of quadratics and of any Hessian."""

import itertools

import pytest
import torch

from schatten.diagnostics import smoothness
from schatten.diagnostics.core import Block
from schatten.diagnostics.lanczos import shortfall
from schatten.diagnostics.smoothness import QUANTITY, ascend, spectral_smoothness
from schatten.rule import Rule
from tests.contracts import curvature_laws as laws

SHAPES = [(4, 4), (3, 6), (6, 3), (1, 5), (5, 1)]


def positive(size, seed):
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A @ A.mT


def kronecker(shape, seed):
    """D -> P D Q, and its L_*: the sum of products of the leading eigenvalues of both, in order."""
    P, Q = positive(shape[0], seed), positive(shape[1], seed + 100)
    p, q = (torch.linalg.eigvalsh(X).flip(0)[: min(shape)] for X in (P, Q))
    return (lambda D: P @ D @ Q), (P, Q), (p * q).sum()


def nuclear(X):
    return torch.linalg.svdvals(X).sum(-1)


def empty(shape):
    return torch.empty(shape, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_kronecker_hessian_no_direction_exceeds_the_paired_eigenvalues_which_their_vectors_attain(shape, seed):
    product, (P, Q), truth = kronecker(shape, seed)
    r = min(shape)
    D = torch.linalg.eigh(P).eigenvectors.flip(1)[:, :r] @ torch.linalg.eigh(Q).eigenvectors.flip(1)[:, :r].mT
    assert float(nuclear(product(D))) == pytest.approx(float(truth))
    for _ in range(30):
        U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        assert nuclear(product(U @ Vh)) <= truth * (1 + 1e-12)
    # The bound of the paper on J; equal only where P's leading eigenvalues are.
    assert truth <= torch.linalg.matrix_norm(P, 2) * nuclear(Q) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bounds_enclose_the_truth_and_ascent_comes_near_it(shape, seed):
    product, (P, Q), truth = kronecker(shape, seed)
    S = spectral_smoothness(product, empty(shape), iterations=40)
    L = torch.linalg.matrix_norm(P, 2) * torch.linalg.matrix_norm(Q, 2)
    assert float(S.L.value) == pytest.approx(float(L), rel=1e-6)
    # 1e-8 is what the polar factors of fp64 leave.
    assert S.L.value <= S.lower * (1 + 1e-12) and S.lower <= truth * (1 + 1e-7) and truth <= S.upper * (1 + 1e-12)
    # Seen within 10 % on 100 draws with as many steps.
    assert S.lower > 0.85 * truth
    assert 1 - 1e-9 <= S.gain <= min(shape) * (1 + 1e-9)


def test_with_an_identity_on_one_side_it_is_the_nuclear_norm_of_the_other():
    Q = positive(5, 0)
    S = spectral_smoothness(lambda D: D @ Q, empty((7, 5)), steps=60)
    assert float(S.lower) == pytest.approx(float(nuclear(Q)), rel=1e-6)
    # That of the quadratic tr(W Q W^T) / 2 of the paper, whose gradient moves by (W - W') Q.
    A, B = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert nuclear((A - B) @ Q) <= float(S.lower) * torch.linalg.matrix_norm(A - B, 2) * (1 + 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["positive", "indefinite"])
def test_ascent_never_falls(shape, kind):
    size = shape[0] * shape[1]
    H = positive(size, 3)
    H = H if kind == "positive" else H - 2 * torch.eye(size, dtype=torch.float64) * H.diagonal().mean()
    values = ascend(lambda D: (H @ D.reshape(-1)).view(shape), torch.randn(shape, dtype=torch.float64), 30)
    assert (values.diff() >= -1e-7 * values[-1]).all() and values[0] > 0


@pytest.mark.parametrize("i", [0, 1, 2])
def test_for_a_real_hessian_the_bounds_hold_for_every_direction_tried(i):
    product, G, H = laws.block(i)
    S = spectral_smoothness(product, G, start=G, iterations=G.numel())
    exact = torch.linalg.eigvalsh(H).abs().max()
    assert float(S.upper) == pytest.approx(min(G.shape) * float(exact), rel=1e-9)
    for seed in range(20):
        U, _, Vh = torch.linalg.svd(torch.randn(G.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        D = U[:, : min(G.shape)] @ Vh[: min(G.shape)]
        assert nuclear(product(D)) <= S.upper
        # Random directions find less than ascent.
        assert nuclear(product(D)) < S.lower
    # J of the polar factor is a lower bound as well, and the ascent from G starts above it.
    D = torch.linalg.svd(G, full_matrices=False)[0] @ torch.linalg.svd(G, full_matrices=False)[2]
    assert (D * product(D)).sum() <= ascend(product, G, 1)[0] * (1 + 1e-7) <= S.lower * (1 + 1e-6)


def test_ascent_may_end_in_a_local_maximum_which_is_a_lower_bound_still():
    # Of 1 x 1 blocks op is the largest entry and nuc the sum, so that all signs can be tried: L_* is 7.
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)

    def product(D):
        return (H @ D.reshape(-1)).view(2, 1, 1)

    best = max(float(e @ H @ d) for e, d in itertools.product(map(_signs, range(4)), repeat=2))
    ends = sorted({round(float(ascend(product, _signs(k).view(2, 1, 1))[-1]), 6) for k in range(4)})
    assert ends == [3.0, 7.0] and best == 7.0
    S = spectral_smoothness(product, empty((2, 1, 1)), start=torch.ones(2, 1, 1, dtype=torch.float64))
    assert float(S.lower) == pytest.approx(best, rel=1e-6) and S.rank == 2


def _signs(k):
    return torch.tensor([1.0 if k & 1 else -1.0, 1.0 if k & 2 else -1.0], dtype=torch.float64)


def test_costs_are_those_stated_and_the_quantity_is_the_function():
    product, G, _ = laws.block(0)
    calls = []

    def counted(V):
        calls.append(1)
        return product(V)

    S = spectral_smoothness(counted, G, start=G, steps=7, starts=3, iterations=5)
    assert len(calls) == 5 + 7 * 4
    assert float(S.upper) == pytest.approx(4 * shortfall(20, 5) * float(S.L.value))
    found = QUANTITY(steps=7, starts=3, iterations=5)(
        Block("w", Rule(), {}, G[None], gradient=G[None], hessian=lambda V: product(V[0])[None])
    )
    assert found.keys() == QUANTITY.columns.keys()
    for name, value in (("lower", S.lower), ("upper", S.upper), ("L", S.L.value), ("gain", S.gain)):
        assert float(found[name]) == pytest.approx(float(value))


def test_single_precision_gives_lower_bounds_too():
    _, (P, Q), truth = kronecker((4, 6), 0)
    S = spectral_smoothness(lambda D: P.float() @ D @ Q.float(), torch.empty(4, 6), steps=30)
    # What is divided out for the polar factor, 1.001^2, and rounding.
    assert 0.97 * truth < S.lower <= truth * (1 + 1e-5)


def test_an_ascent_whose_directions_are_turned_is_seen(monkeypatch):
    right = smoothness._msgn
    monkeypatch.setattr(smoothness, "_msgn", lambda X: (right(X)[0].flip(-1), right(X)[1]))
    product, _, truth = kronecker((4, 4), 0)
    assert spectral_smoothness(product, empty((4, 4)), iterations=1).lower < 0.85 * truth


@pytest.mark.parametrize(("shape", "options"), [((3,), {}), ((2, 2), {"steps": 0}), ((2, 2), {"starts": 0})])
def test_nonsense_is_refused(shape, options):
    with pytest.raises(ValueError, match=r"matrices|steps >= 1"):
        spectral_smoothness(lambda V: V, empty(shape), **options)
