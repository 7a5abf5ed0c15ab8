"""Dion and Dion2: what is transmitted and what waits, and when they are Muon (arXiv 2504.05295, 2512.16928)."""

import pytest
import torch
from torch import nn

import schatten
from schatten.presets.dion import Dion
from schatten.presets.dion2 import Dion2

MU = 0.95

SHAPES = [(9, 5), (5, 9), (6, 6)]

# fp64 rounding of products and QR factors of matrices this small, which a condition of 1e3 at most may multiply.
PRECISION = 1e-11


def draws(shape, count, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(build, gradients):
    """D of every step, read off the weights, and the momentum buffer after it."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    opt = build([p], lr=1.0, weight_decay=0.0, scale="none")
    for G in gradients:
        before, p.grad = p.detach().clone(), G.clone()
        opt.step()
        yield before - p.detach(), opt.state[p]["momentum_buffer"].clone()


def dion(rank, variant):
    return lambda params, **options: Dion(params, rank=rank, variant=variant, **options)


def assert_near(a, b, precision=PRECISION):
    assert (a - b).norm() <= precision * b.norm(), f"{((a - b).norm() / b.norm()).item():.2g}"


@pytest.mark.parametrize("variant", ["dion", "orth"])
@pytest.mark.parametrize("rank", [0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_momentum_is_what_was_there_less_a_share_of_its_projection_onto_the_direction(shape, rank, variant):
    M = torch.zeros(shape, dtype=torch.float64)
    for G, (D, new) in zip(draws(shape, 5), directions(dion(rank, variant), draws(shape, 5)), strict=True):
        B = M + G
        D, B = (D, B) if shape[0] >= shape[1] else (D.mT, B.mT)
        projected = D @ torch.linalg.pinv(D) @ B
        kept = new if shape[0] >= shape[1] else new.mT
        assert_near(kept + (1 - MU) * projected, B)
        M = new


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_orthonormal_variant_has_singular_values_1_and_descends(shape):
    M = torch.zeros(shape, dtype=torch.float64)
    for G, (D, new) in zip(draws(shape, 5), directions(dion(0.5, "orth"), draws(shape, 5)), strict=True):
        sigma = torch.linalg.svdvals(D)[: -(-min(shape) // 2)]
        torch.testing.assert_close(sigma, torch.ones_like(sigma), rtol=0, atol=1e-12)
        # <P Q^T, B> is the trace of Q^T R, the sum of R's positive diagonal; with QR's own signs it was negative.
        assert (D * (M + G)).sum() > 0
        M = new


@pytest.mark.parametrize("variant", ["dion", "orth"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_full_rank_the_momentum_is_muons_sum(shape, variant):
    total = torch.zeros(shape, dtype=torch.float64)
    for G, (_, M) in zip(draws(shape, 10), directions(dion(1.0, variant), draws(shape, 10)), strict=True):
        total = MU * total + G
        assert_near(M, MU * total)


@pytest.mark.parametrize("variant", ["dion", "orth"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_full_rank_and_a_constant_gradient_the_direction_becomes_muons(shape, variant):
    U, _, Vh = torch.linalg.svd(draws(shape, 1)[0], full_matrices=False)
    G = U @ torch.diag(0.5 ** torch.arange(min(shape), dtype=torch.float64)) @ Vh
    *_, (D, _) = directions(dion(1.0, variant), G.expand(30, *shape))
    # A power iteration takes what is left of a neighbour, half as large, to a quarter: 30 leave 1e-18 of it.
    assert_near(D, U @ Vh)


@pytest.mark.parametrize("variant", ["dion", "orth"])
@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=str)
def test_rounding_errors_of_a_rank_one_gradient_become_no_directions(shape, variant):
    p = nn.Parameter(torch.zeros(shape))
    opt = Dion([p], lr=1.0, weight_decay=0.0, rank=0.5, variant=variant, scale="none")
    u, v = (torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in shape)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.outer(u, v)
        opt.step()
        # One unit direction; others would have singular values of 1 as well.
        sigma = torch.linalg.svdvals(before - p.detach())
        assert sigma[0] == pytest.approx(1, abs=1e-5) and sigma[1] < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dion2_of_all_slices_is_muon_of_the_sum_without_nesterov(shape):
    def muon(params, **options):
        return schatten.Muon(params, form="sum", nesterov=False, momentum=MU, solver=schatten.solvers.svd(), **options)

    def dion2(params, **options):
        return Dion2(params, fraction=1.0, momentum=MU, solver=schatten.solvers.svd(), **options)

    gradients = draws(shape, 10)
    for (D, M), (muons, total) in zip(directions(dion2, gradients), directions(muon, gradients), strict=True):
        assert_near(D, muons)
        assert_near(M, MU * total)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_slices_that_dion2_does_not_choose_gather_gradients_undecayed_and_only_decay(shape):
    by_rows = shape[0] < shape[1]
    start, *gradients = draws(shape, 6)
    for G in gradients:
        (G if by_rows else G.mT)[2] *= 1e3  # always the heaviest of the shorter side's slices
    p = nn.Parameter(start.clone())
    opt = Dion2([p], lr=0.1, weight_decay=0.5, fraction=0.25)
    for G in gradients:
        p.grad = G.clone()
        opt.step()
    W, M = p.detach(), opt.state[p]["momentum_buffer"]
    total, start = sum(gradients), start * (1 - 0.1 * 0.5) ** 5
    W, M, total, start = (X if by_rows else X.mT for X in (W, M, total, start))
    others = [0, 1, 3]
    assert_near(M[others], total[others])
    assert_near(W[others], start[others])
    assert (W[2] - start[2]).norm() > 0.1
