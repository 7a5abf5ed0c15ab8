"""The three products agree with their formulas in fp64, for every name behind the seam."""

import pytest
import torch

from schatten import kernels
from schatten.kernels.choice import lacking, on_triton
from tests.contracts.matrices import gaussian

# fp64 rounding of sums of at most 30 products of entries near 1.
FP64 = 1e-12

BATCHES = [(1, 1, 1), (1, 4, 9), (3, 4, 4), (5, 8, 30)]


def symmetric(b, m):
    """Three symmetric matrices that commute: polynomials of one."""
    X = gaussian(b, m, m, seed=m)
    A = (X + X.mT) / 2
    return A, A @ A, 2 * A - A @ A @ A


def operands(shape):
    b, m, n = shape
    A, B, C = symmetric(b, m)
    X = gaussian(b, m, n, seed=n)
    return A, B, C, X


def test_a_total_grows_by_a_weight_times_the_product():
    A, B, C, X = operands((3, 4, 9))
    for weight in (0.5, torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64).reshape(3, 1, 1)):
        for product, shape in (
            (lambda **k: kernels.sym(A, B, C, 0.7, -1.3, **k), (3, 4, 4)),
            (lambda **k: kernels.affine(B, X, 0.5, **k), (3, 4, 9)),
        ):
            start = gaussian(*shape)
            total = start.clone()
            result = product(total=total, weight=weight)
            assert torch.equal(result, product())
            assert (total - (start + weight * result)).abs().max() < 1e3 * FP64


@pytest.mark.parametrize("n", [30, 300])  # together, and one by one
def test_a_quotient_is_rounded_once(n):
    X, divisor = gaussian(3, n, n).float(), torch.tensor([0.3, 7.0, 1e-20]).reshape(3, 1, 1)
    assert torch.equal(kernels.quotient(X, divisor, torch.bfloat16), (X / divisor).bfloat16())


def test_a_back_end_is_in_use_inside_its_block_alone():
    X = gaussian(1, 2, 2)
    assert not on_triton(X)
    with pytest.raises(ValueError, match="kernels must be one of 'auto', 'eager', 'triton', got 'cuda'"), kernels.use("cuda"):
        pass
    with kernels.use("eager"):
        assert lacking(X.device) == "asked for"
    assert lacking(X.device) == "on cpu"


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_the_products_agree_with_their_formulas(shape):
    A, B, C, X = operands(shape)
    for i in range(shape[0]):
        a, b, c, x = (M[i] for M in (A, B, C, X))
        assert (kernels.gram(X)[i] - x @ x.T).abs().max() < FP64
        # Entries of A B reach 1e3 at the largest size.
        assert (kernels.sym(A, B, C, 0.7, -1.3)[i] - (0.7 * c - 1.3 * a @ b)).abs().max() < 1e3 * FP64
        assert (kernels.affine(B, X, -0.4)[i] - (-0.4 * x + b @ x)).abs().max() < 1e3 * FP64


@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_symmetric_products_are_symmetric(shape):
    A, B, C, X = operands(shape)
    for M in (kernels.gram(X), kernels.sym(A, B, C, 0.7, -1.3), kernels.sym(A, A, A, 2.0, 0.5)):
        assert (M - M.mT).abs().max() < 1e3 * FP64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_only_read_and_dtypes_kept(dtype):
    given = [M.to(dtype) for M in operands((3, 4, 9))]
    A, B, C, X = given
    copies = [M.clone() for M in given]
    for result, shape in (
        (kernels.gram(X), (3, 4, 4)),
        (kernels.sym(A, B, C, 0.5, 2.0), (3, 4, 4)),
        (kernels.affine(B, X, 3.0), (3, 4, 9)),
    ):
        assert result.dtype == dtype and result.shape == shape
        assert all(result.data_ptr() != M.data_ptr() for M in given)
    assert all(torch.equal(M, copy) for M, copy in zip(given, copies, strict=True))


def test_transposed_operands_are_read_as_they_are():
    X = gaussian(2, 9, 4).mT
    A = gaussian(2, 4, 4)
    A = (A + A.mT).mT
    assert (kernels.gram(X) - kernels.gram(X.contiguous())).abs().max() < FP64
    assert (kernels.affine(A, X, 2.0) - kernels.affine(A.contiguous(), X.contiguous(), 2.0)).abs().max() < 1e2 * FP64


def test_half_precision_sums_in_full():
    # A thousand products of 1: summed in bf16 they would stick at 256.
    ones = torch.ones(1, 2, 1000, dtype=torch.bfloat16)
    assert kernels.gram(ones).unique().tolist() == [1000.0]


def test_a_nan_stays_in_its_matrix():
    A, B, C, X = operands((3, 4, 9))
    X[1, 0, 0] = B[1, 0, 0] = torch.nan
    for result in (kernels.gram(X), kernels.sym(A, B, C, 0.5, 2.0), kernels.affine(B, X, 3.0)):
        assert result[[0, 2]].isfinite().all() and not result[1].isfinite().all()


@pytest.mark.parametrize(("m", "n"), [(512, 600), (513, 513), (530, 700)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_symmetric_products_from_strips_agree_too(m, n, dtype):
    X = (gaussian(2, m, n) / m**0.5).to(dtype)
    A = X @ X.mT
    # Rounding of sums of 700 products: 1e-16 and 6e-8, times 30.
    rounding = {torch.float64: 1e-13, torch.float32: 5e-5}[dtype]
    for M, expected in (
        (kernels.gram(X), A),
        (kernels.gram(X.mT.contiguous().mT), A),
        (kernels.sym(A, A, A, 0.7, -1.3), 0.7 * A - 1.3 * A @ A),
    ):
        assert (M - expected).abs().max() < rounding * expected.abs().max()
        # A strip's diagonal block is one GEMM, symmetric to rounding; what is mirrored is so exactly.
        assert (M - M.mT).abs().max() < rounding * expected.abs().max()
        assert torch.equal(M[:, : m // 8, -m // 8 :], M.mT[:, : m // 8, -m // 8 :])


@pytest.mark.parametrize("m", [8, 520])
def test_a_given_place_is_written_to_and_changes_no_bit(m):
    X = gaussian(2, m, m + 40) / m**0.5
    A = kernels.gram(X)
    for product, place in (
        (lambda out: kernels.gram(X, out=out), torch.empty_like(A)),
        (lambda out: kernels.sym(A, A, A, 0.7, -1.3, out=out), torch.empty_like(A)),
        (lambda out: kernels.affine(A, X, 0.5, out=out), torch.empty_like(X)),
        (lambda out: kernels.affine(A, X.mT.contiguous().mT, 0.5, out=out), torch.empty(2, m + 40, m).double().mT),
    ):
        expected = product(None)
        result = product(place)
        assert torch.equal(result, expected) and torch.equal(place, expected) and result.data_ptr() == place.data_ptr()
