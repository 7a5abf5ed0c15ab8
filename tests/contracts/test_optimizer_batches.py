"""Batching is invisible: matrices stepped together end where they end alone, whoever else has a gradient."""

import pytest
import torch
from torch import nn

import schatten
from schatten import batching, solvers

SHAPES = [(6, 4), (6, 4), (3, 5), (6, 4), (3, 5), (7, 1)]


@pytest.fixture
def one_by_one(monkeypatch):
    """Every matrix is a batch of its own, and every row a part."""
    monkeypatch.setattr(batching, "BYTES_PER_ENTRY", 1 << 40)
    monkeypatch.setattr(batching, "MAX_CPU_PART_ENTRIES", 1)


@pytest.fixture
def two_by_two(monkeypatch):
    """Two matrices to a part, three to a batch, so that both cuts fall inside a shape."""
    monkeypatch.setattr(batching, "BYTES_PER_ENTRY", batching.MAX_BATCH_BYTES // (3 * 24))
    monkeypatch.setattr(batching, "MAX_CPU_PART_ENTRIES", 2 * 24)


def run(optimizer, dtype, present=lambda step, i: True, together=True, steps=4, **options):
    """Train SHAPES by one optimizer or by one each; gradients depend on step and matrix only."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    opts = [optimizer(params, **options)] if together else [optimizer([p], **options) for p in params]
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = g if present(step, i) else None
        for opt in opts:
            opt.step()
    return [p.detach() for p in params]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_optimizer_over_all_matrices_equals_one_optimizer_for_each(preset, dtype):
    # Plain rounding: the noise of stochastic rounding is numbered within an optimizer.
    options = {"lr": 0.1, "rounding": "nearest"}
    together, alone = run(preset, dtype, **options), run(preset, dtype, together=False, **options)
    for a, b in zip(together, alone, strict=True):
        # Measured 0 at this size and 7e-7 in fp32 products of 96 x 130. Another kernel may sum in another order, in bf16
        # products an ulp of 2^-8 in some entries of the direction, in steps of 0.1 * 0.2 sqrt(7) = 0.05, four times.
        # A matrix that took its neighbour's step is off by 0.05.
        noise = {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 2**-6}[dtype]
        torch.testing.assert_close(a, b, rtol=noise, atol=noise)


def test_with_an_exact_solver_they_are_bit_equal(dtype):
    options = {"lr": 0.1, "rounding": "nearest", "solver": solvers.svd()}
    assert all_equal(run(schatten.Muon, dtype, **options), run(schatten.Muon, dtype, together=False, **options))


@pytest.mark.parametrize("cut", ["one_by_one", "two_by_two"])
def test_where_batches_are_cut_changes_no_bit_not_even_of_the_rounding_noise(dtype, cut, request):
    options = {"lr": 0.1, "solver": solvers.svd()}
    uncut = run(schatten.Muon, dtype, **options)
    request.getfixturevalue(cut)
    assert all_equal(uncut, run(schatten.Muon, dtype, **options))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (2, 6, 4), (12, 5)], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "gradient", "parameter", "state"])
def test_rows_of_convolutions_banks_and_strided_tensors_step_as_a_whole(shape, strides, request):
    # Rows are of the logical matrices, which are not those of the tensor's last dimension, and need views.
    def strided(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def trained():
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(shape, generator=generator)
        W = nn.Parameter(strided(start) if strides == "parameter" else start)
        layout = "experts" if len(shape) == 3 else "auto"
        opt = schatten.Muon([{"params": [W], "layout": layout}], lr=0.1, solver=solvers.svd())
        if strides == "state":
            opt.state[W]["momentum_buffer"] = strided(opt.state[W]["momentum_buffer"])
        for _ in range(3):
            G = torch.randn(shape, generator=generator)
            W.grad = strided(G) if strides == "gradient" else G
            opt.step()
        return W.detach().clone()

    whole = trained()
    request.getfixturevalue("one_by_one")
    assert torch.equal(trained(), whole)


def test_a_large_convolution_steps_by_rows():
    W = nn.Parameter(torch.zeros(256, 256, 3, 3))
    assert W.numel() > batching.MAX_CPU_PART_ENTRIES
    W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
    opt = schatten.Muon([W], lr=0.1, weight_decay=0.0, scale="none")
    opt.step()
    D = -W.detach().flatten(1) / 0.1
    sigma = torch.linalg.svdvals(D.double())
    assert 0.82 < sigma.min() and sigma.max() < 1.18  # the default band and bf16 products


def test_the_noise_of_a_matrix_does_not_depend_on_who_else_has_a_gradient():
    options = {"lr": 0.1, "solver": solvers.svd(), "dtype": torch.bfloat16}
    everyone = run(schatten.Muon, **options)
    some = run(schatten.Muon, **options, present=lambda step, i: i in (1, 3, 4))
    assert all(torch.equal(everyone[i], some[i]) for i in (1, 3, 4))
    assert not any(torch.equal(everyone[i], some[i]) for i in (0, 2, 5))


def test_steps_with_missing_gradients_equal_steps_of_each_matrix_on_its_own_gradients(dtype):
    def present(step, i):
        return (step + i) % 3 != 0

    options = {"lr": 0.1, "rounding": "nearest", "solver": solvers.svd(), "present": present}
    assert all_equal(run(schatten.Muon, dtype, **options), run(schatten.Muon, dtype, together=False, **options))


def test_one_shape_in_two_dtypes_and_two_groups_trains_as_separate_optimizers():
    start, g = torch.randn(4, 6, 4), torch.randn(4, 6, 4)
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float64]
    together, alone = ([nn.Parameter(w.to(t)) for w, t in zip(start, dtypes, strict=True)] for _ in range(2))
    options = {"solver": solvers.svd(), "lr": 0.1}
    opts = [schatten.Muon([{"params": together[:2]}, {"params": together[2:], "momentum": 0.5, "nesterov": False}], **options)]
    opts += [schatten.Muon([p], **options) for p in alone[:2]]
    opts += [schatten.Muon([p], momentum=0.5, nesterov=False, **options) for p in alone[2:]]
    for _ in range(2):
        for params in (together, alone):
            for p, gradient in zip(params, g, strict=True):
                p.grad = gradient.to(p.dtype)
        for opt in opts:
            opt.step()
    assert all_equal(together, alone)


def test_equal_matrices_in_bf16_get_different_noise():
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    opt = schatten.Muon(params, lr=1e-2)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        opt.step()
        moved = [p != w for p, w in zip(params, before, strict=True)]
        # Decay of 1e-3 moves a weight of 1 down one ulp of 2^-8 with probability 0.26: the same 4096 twice is no chance.
        assert not torch.equal(*moved)
