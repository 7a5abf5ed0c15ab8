"""For any shape, scale and dtype: weights stay finite, gradients unwritten, and the step does not see the gradient's scale."""

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import schatten
from schatten import solvers

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SOLVERS = st.sampled_from([solvers.polynomial(), solvers.newton_schulz(), solvers.svd()])
SCALES = st.sampled_from(["adamw-rms", "keller", "mup", "none"])

# Powers of two within [1e-30, 1e30]: multiplying by them rounds nothing, so results must agree bit for bit.
EXPONENTS = st.integers(-99, 99)

# Derandomised, so that a run is repeatable; no deadline, as nothing here is about time.
checked = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def gradients(shape, dtype, seed, count=2):
    """Entries of magnitude in [0.25, 1.25), so that no power of two above pushes one into the denormal range."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.rand(count, *shape, generator=generator) + 0.25
    sign = torch.randint(0, 2, (count, *shape), generator=generator) * 2 - 1
    return (magnitude * sign).to(dtype)


def weights_after(start, gradients, factor=1.0, **options):
    p = nn.Parameter(start.clone())
    opt = schatten.Muon([p], lr=0.1, **options)
    for g in gradients:
        p.grad = g * factor
        given = p.grad.clone()
        opt.step()
        assert torch.equal(p.grad, given)
    assert opt.metrics()["skipped"] == {}
    return p.detach()


@checked
@given(shape=SHAPES, dtype=DTYPES, exponent=EXPONENTS, seed=st.integers(0, 99), solver=SOLVERS, scale=SCALES)
@example(shape=(1, 1), dtype=torch.float32, exponent=99, seed=0, solver=solvers.polynomial(), scale="keller")
@example(shape=(1, 9), dtype=torch.bfloat16, exponent=-99, seed=0, solver=solvers.polynomial(), scale="mup")
@example(shape=(9, 1), dtype=torch.float64, exponent=-99, seed=0, solver=solvers.newton_schulz(), scale="adamw-rms")
def test_the_step_does_not_depend_on_the_gradients_scale(shape, dtype, exponent, seed, solver, scale):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    g = gradients(shape, dtype, seed)
    plain = weights_after(start, g, solver=solver, scale=scale)
    scaled = weights_after(start, g, factor=2.0**exponent, solver=solver, scale=scale)
    assert plain.isfinite().all() and not torch.equal(plain, start)
    assert torch.equal(plain, scaled)


@checked
@given(shape=SHAPES, dtype=DTYPES, exponent=st.integers(-30, 30), seed=st.integers(0, 99), form=st.sampled_from(["ema", "sum"]))
def test_a_step_is_as_long_as_lr_and_scale_say(shape, dtype, exponent, seed, form):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    opt = schatten.Muon([p], lr=0.5, scale="none", form=form, rounding="nearest", solver=solvers.svd())
    p.grad = gradients(shape, dtype, seed, count=1)[0] * 10.0**exponent
    opt.step()
    # From zero the weight is -lr U V^T: spectral norm lr, up to the parameter's precision (Frobenius norm of the
    # rounding of min(m, n) <= 9 unit directions: 3 half ulps) or the 1e-14 that LAPACK's fp64 SVDs of 9 x 9 leave.
    precision = max(3 * torch.finfo(dtype).eps, 1e-13)
    assert math.isclose(torch.linalg.matrix_norm(p.detach().double(), ord=2), 0.5, rel_tol=precision)


@checked
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    rank=st.integers(0, 2),
    dtype=DTYPES,
    seed=st.integers(0, 99),
    nesterov=st.booleans(),
)
def test_degenerate_gradients_leave_weights_finite_and_inside_the_step(rows, columns, rank, dtype, seed, nesterov):
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))
    opt = schatten.Muon([p], lr=0.5, weight_decay=0.0, scale="none", nesterov=nesterov)
    steps = 3
    for _ in range(steps):
        left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
        p.grad = (left @ right).to(dtype)
        opt.step()
    assert p.isfinite().all()
    # The default solver promises directions of spectral norm at most 1.16, and 0.03 of bf16 rounding; stored bf16 weights
    # of up to 2 are each off by an ulp of 2^-7 per step at most, 0.05 on 6 x 6 in Frobenius norm.
    assert torch.linalg.matrix_norm(p.detach().double(), ord=2) <= steps * (0.5 * 1.19 + 0.05)
    if rank == 0:
        assert p.count_nonzero() == 0


@checked
@given(value=st.floats(width=32), dtype=DTYPES)
@example(value=3.4e38, dtype=torch.float32)
@example(value=3.3e35, dtype=torch.float32)
@example(value=1e-45, dtype=torch.float32)
@example(value=float("nan"), dtype=torch.bfloat16)
def test_any_float_as_an_entry_of_a_gradient_leaves_weights_finite(value, dtype):
    p, q = (nn.Parameter(torch.ones(3, 4, dtype=dtype)) for _ in range(2))
    opt = schatten.Muon([p, q], lr=0.1)
    for parameter in (p, q):
        parameter.grad = torch.ones(3, 4, dtype=dtype)
    p.grad[1, 1] = value
    # Room is left for a sum of a thousand gradients, as a momentum is.
    usable = bool((p.grad.float().abs() <= torch.finfo(torch.float32).max / 1024).all())
    opt.step()
    assert p.isfinite().all() and q.isfinite().all()
    assert opt.state[p]["momentum_buffer"].isfinite().all()
    assert not torch.equal(q, torch.ones_like(q))
    assert torch.equal(p, torch.ones_like(p)) != usable
    assert opt.metrics()["skipped_total"] == int(not usable)
