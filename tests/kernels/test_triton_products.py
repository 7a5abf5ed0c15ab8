"""Triton's products against fp64: any shapes and strides, sums, weights moved by the last product, and planted mistakes."""

import importlib.util
import inspect
import itertools
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from schatten.kernels import Bucket, Onto, eager
from schatten.kernels.triton import product, product_kernel, product_tiles
from schatten.kernels.triton.product_tiles import Tiles
from schatten.rounding import stochastic_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Below, at and above the interpreter's tiles of 32, in every direction.
SHAPES = ((1, 1, 1), (2, 7, 3), (1, 32, 64), (3, 33, 40))

# What is not finite makes numpy warn in the interpreter.
loud = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture
def tiles(monkeypatch):
    """Set the interpreter's tiles, which plans remember."""

    def become(tiles: Tiles) -> None:
        monkeypatch.setattr(product_tiles, "INTERPRETED", tiles)
        product._planned.cache_clear()

    yield become
    monkeypatch.undo()
    product._planned.cache_clear()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def symmetric(b: int, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
    A = randn(b, m, m) / (2 * m) ** 0.5
    return (A + A.mT).to(dtype)


def check_product(got: Tensor, P: Tensor, Q: Tensor, C: Tensor | None = None, a: float = 0.0, b: float = 1.0) -> None:
    """`got` is b P Q + a C with one rounding into its dtype and k + 2 of fp32, entry by entry."""
    P64, Q64 = P.double(), Q.double()
    exact, size = b * (P64 @ Q64), abs(b) * (P64.abs() @ Q64.abs())
    if C is not None:
        exact, size = exact + a * C.double(), size + abs(a) * C.double().abs()
    # Half a unit of the result's dtype, and a denormal's of fp16.
    unit, least = torch.finfo(got.dtype).eps / 2, torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    allowed = unit * exact.abs() + (P.shape[-1] + 2) * 2.0**-23 * size + least
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= allowed).all())


def strided(X: Tensor, layout: str) -> Tensor:
    """The same entries, laid out otherwise."""
    if layout == "transposed":
        return X.mT.contiguous().mT
    if layout == "sliced":
        room = X.new_full((X.shape[0] + 1, 2 * X.shape[1] + 1, 3 * X.shape[2] + 2), torch.nan)
        view = room[1:, 1::2, 2::3]
        view.copy_(X)
        return view
    return X


LAYOUTS = ("plain", "transposed", "sliced")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_any_shape_agree_with_fp64(shape, dtype):
    b, m, n = shape
    X, A, C = randn(b, m, n, dtype=dtype), symmetric(b, m, dtype), symmetric(b, m, dtype)
    before = [t.clone() for t in (X, A, C)]
    G, S, Y = product.gram(X), product.sym(A, A, C, -1.5, 0.7), product.affine(A, X, 3.4)
    assert G.dtype == S.dtype == Y.dtype == dtype
    check_product(G, X, X.mT)
    check_product(S, A, A, C, -1.5, 0.7)
    check_product(Y, A, X, X, 3.4)
    assert all(torch.equal(t, old) for t, old in zip((X, A, C), before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_products_of_any_layout_agree_with_fp64(layout, dtype):
    X, A = randn(2, 35, 40, dtype=dtype), symmetric(2, 35, dtype)
    Xs, As = strided(X, layout), strided(A, layout)
    check_product(product.gram(Xs), X, X.mT)
    check_product(product.sym(As, As, As, 2.0, -1.0), A, A, A, 2.0, -1.0)
    check_product(product.affine(As, Xs, 0.0), A, X)


def test_an_expanded_matrix_serves_a_batch():
    X, A = randn(3, 20, 33), symmetric(1, 20)
    check_product(product.affine(A.expand(3, 20, 20), X, 1.0), A.expand(3, 20, 20), X, X, 1.0)
    assert torch.equal(product.gram(X[:1].expand(3, 20, 33)), product.gram(X[:1]).expand(3, 20, 20))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_go_where_they_are_wanted_and_nowhere_else(layout):
    X, A = randn(2, 35, 40), symmetric(2, 35)
    for give, like in (
        (lambda out: product.gram(X, out), A),
        (lambda out: product.sym(A, A, A, 1.0, 2.0, out), A),
        (lambda out: product.affine(A, X, 1.0, out), X),
    ):
        out = strided(torch.zeros_like(like), layout)
        outside = out._base.isnan().sum() if out._base is not None else 0
        assert give(out) is out
        assert torch.equal(out, give(None))
        if out._base is not None:
            assert out._base.isnan().sum() == outside


def test_a_result_has_the_layout_of_eager_torchs():
    A, X = symmetric(2, 5), randn(2, 5, 8)
    for layout in LAYOUTS:
        Y = strided(X, layout)
        assert product.affine(A, Y, 1.0).stride() == eager.affine(A, Y, 1.0).stride()
        assert product.gram(Y).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_symmetric_products_are_symmetric_to_the_bit(dtype):
    X, A = randn(1, 40, 45, dtype=dtype), symmetric(1, 40, dtype)
    # Commuting only up to rounding, as in an iteration.
    B = torch.linalg.inv(A.double() + 4 * torch.eye(40, device=DEVICE)).to(dtype)
    B = ((B.double() + B.double().mT) / 2).to(dtype)
    for S in (product.gram(X), product.sym(A, B, A, 1.3, -0.4)):
        assert torch.equal(S, S.mT)


def test_tf32_is_taken_where_torch_is_allowed_to(monkeypatch):
    X, A = randn(2, 48, 64), symmetric(2, 48)
    asked, planned = [], product._planned
    monkeypatch.setattr(product, "_planned", lambda *args: asked.append(args[3]) or planned(*args))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = product.gram(X), product.sym(A, A, A, 1.0, 1.0), product.affine(A, X, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["tf32"] * 3
    exact = X.double() @ X.double().mT, A.double() + A.double() @ A.double(), X.double() + A.double() @ X.double()
    sizes = X.abs() @ X.abs().mT, A.abs() @ A.abs(), A.abs() @ X.abs()
    for Y, E, size in zip(found, exact, sizes, strict=True):
        # Both factors have ten bits behind the first.
        assert bool(((Y - E).abs() <= 2.0**-9 * size + 2.0**-22 * E.abs()).all())


@pytest.mark.parametrize("hopper", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_most_four_tiles_are_tried_and_all_are_possible(dtype, hopper, monkeypatch):
    monkeypatch.setattr(product_tiles, "interpreted", lambda: False)
    monkeypatch.setattr(product_tiles, "_device", lambda device: (132, hopper))
    for kind, m, n, batch, loose in itertools.product(
        ("gram", "sym", "affine"), (1, 64, 1024), (64, 4096), (1, 64), (True, False)
    ):
        for precision in ("ieee", "tf32"):
            found = product_tiles.candidates(kind, m, n, batch, dtype, precision, loose, torch.device("cpu"))
            assert 1 <= len(found) == len(set(found)) <= 4
            for tiles in found:
                assert kind == "affine" or tiles.rows % tiles.cols == 0
                assert kind == "affine" or product_tiles.UNFUSED.get(tiles, tiles).rows % tiles.cols == 0
                # What all GPUs from capability 8.0 on have.
                assert max(tiles.stages - 1, 1) * (tiles.rows + tiles.cols) * tiles.depth * dtype.itemsize <= 99 << 10


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has tiles of its own")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((2, 320, 400), (3, 1024, 1024), (2, 100, 75)))
def test_every_candidate_multiplies_right(shape, dtype, monkeypatch):
    b, m, n = shape
    X, A = randn(b, m, n, dtype=dtype), symmetric(b, m, dtype)
    checks = {
        "gram": lambda: check_product(product.gram(X), X, X.mT),
        "sym": lambda: check_product(product.sym(A, A, A, 1.5, -0.5), A, A, A, 1.5, -0.5),
        "affine": lambda: check_product(product.affine(A, X, 2.0), A, X, X, 2.0),
    }
    for kind, check in checks.items():
        for tiles in product_tiles.candidates(kind, m, n, b, dtype, "ieee", bool(m % 16), X.device):
            monkeypatch.setattr(product, "choose", lambda *_, tiles=tiles: tiles)
            check()


@pytest.mark.skipif(DEVICE == "cuda", reason="there tiles are chosen by their time")
@pytest.mark.parametrize("own", (Tiles(16, 16, 64, 4, 1), Tiles(64, 64, 16, 4, 1), Tiles(32, 16, 64, 4, 1)))
def test_any_tiles_give_the_same_product(own, tiles):
    tiles(own)
    X, A = randn(1, 40, 65), symmetric(1, 40)
    total = torch.zeros(1, 40, 40, device=DEVICE)
    G, S = product.gram(X), product.sym(A, A, A, 1.0, 1.0, total=total)
    assert torch.equal(G, G.mT)
    assert torch.equal(S, S.mT)
    check_product(G, X, X.mT)
    check_product(S, A, A, A, 1.0, 1.0)
    check_product(product.affine(A, X, 1.0), A, X, X, 1.0)
    check_product(total, A, A, A, 1.0, 1.0)


def test_more_tile_rows_than_a_group_are_all_computed(tiles):
    tiles(Tiles(16, 16, 256, 4, 1))
    X, A = randn(1, 150, 20), symmetric(1, 150)
    check_product(product.gram(X), X, X.mT)
    check_product(product.affine(A, X, 1.0), A, X, X, 1.0)


@pytest.mark.parametrize(
    ("layout", "weight", "dtype"),
    (
        ("plain", "number", torch.float32),
        ("sliced", "number", torch.bfloat16),
        ("transposed", "tensor", torch.bfloat16),
        ("plain", "one for all", torch.float16),
    ),
)
def test_a_product_adds_a_share_of_its_rounded_result_to_a_sum(layout, weight, dtype):
    X, A = randn(3, 35, 20, dtype=dtype), symmetric(3, 35, dtype)
    w = {"number": -0.3, "tensor": randn(5, 3).T[:, :1].unsqueeze(-1), "one for all": randn(1, 1, 1)}[weight]
    for like, give in (
        (X, lambda total: product.affine(A, X, 1.5, total=total, weight=w)),
        (A, lambda total: product.sym(A, A, A, 1.5, 0.5, total=total, weight=w)),
    ):
        # A sum need not be symmetric itself.
        before = randn(*like.shape)
        total = strided(before.clone(), layout)
        result = give(total)
        exact = before.double() + (w.double() if isinstance(w, Tensor) else w) * result.double()
        # Two roundings of fp32.
        torch.testing.assert_close(total.double(), exact, rtol=2.0**-22, atol=2.0**-22)
        assert torch.equal(result, give(torch.zeros(like.shape, device=DEVICE)))


@loud
@pytest.mark.parametrize(("bad", "dtype"), ((torch.nan, torch.bfloat16), (torch.inf, torch.float32)))
def test_what_is_not_finite_stays_in_its_matrix(bad, dtype):
    X, A = randn(3, 33, 20, dtype=dtype), symmetric(3, 33, dtype)
    clean = product.gram(X), product.sym(A, A, A, 1.0, 1.0), product.affine(A, X, 1.0)
    X[1, 32, 19] = bad
    A[1, 32, 32] = bad
    total = torch.zeros(3, 33, 20, device=DEVICE)
    found = product.gram(X), product.sym(A, A, A, 1.0, 1.0), product.affine(A, X, 1.0, total=total)
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(after[::2], before[::2])
        assert not after[1, 32].isfinite().any()
    assert torch.equal(total[::2], clean[2][::2].float())


def test_a_factor_of_zero_leaves_its_term_out():
    A, X = symmetric(1, 5), randn(1, 5, 6)
    C = torch.full_like(A, torch.nan)
    check_product(product.sym(A, A, C, 0.0, 1.0), A, A)
    check_product(product.affine(A, X, 0.0), A, X)


def test_empty_products_are_empty_or_zero():
    assert product.gram(randn(0, 5, 6)).shape == (0, 5, 5)
    assert product.gram(randn(2, 0, 6)).shape == (2, 0, 0)
    assert torch.equal(product.gram(randn(2, 5, 0)), torch.zeros(2, 5, 5, device=DEVICE))
    assert product.affine(symmetric(2, 5), randn(2, 5, 0), 1.0).shape == (2, 5, 0)
    assert product.sym(randn(0, 5, 5), randn(0, 5, 5), randn(0, 5, 5), 1.0, 1.0).shape == (0, 5, 5)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"A product needs \(b, m, k\), \(b, k, n\)"):
        product.affine(symmetric(2, 5), randn(2, 6, 7), 1.0)
    with pytest.raises(ValueError, match="A product needs"):
        product.gram(randn(2, 5, 7), out=randn(2, 5, 6))


# Weights that the last product moves.


def stacks(weights: list[Tensor], blocks: int) -> Bucket:
    """Parameters (blocks * fan_out, fan_in), or in any strides, as a bucket of their blocks."""
    w = weights[0]
    fan_out = w.shape[0] // blocks
    return Bucket(weights, (blocks, fan_out, w.shape[1]), (fan_out * w.stride(0), w.stride(0), w.stride(1)))


def moved(W: Tensor, D: Tensor, keep: float, length: float, blocks: int) -> Tensor:
    """keep W - length D in fp64, for one parameter and its directions (blocks, m, n)."""
    tall = W.shape[0] // blocks > W.shape[1]
    return keep * W.double() - length * (D.mT if tall else D).reshape(W.shape)


@pytest.mark.parametrize(
    ("dtype", "shape", "blocks"),
    (
        (torch.float32, (33, 40), 1),
        (torch.float32, (40, 33), 3),
        (torch.bfloat16, (5, 9), 3),
        (torch.bfloat16, (40, 33), 1),
        (torch.float16, (7, 7), 2),
    ),
)
def test_the_last_product_moves_weights(dtype, shape, blocks):
    fan_out, fan_in = shape
    m, n = min(shape), max(shape)
    weights = [randn(blocks * fan_out, fan_in, dtype=dtype) for _ in range(2)]
    before = [w.clone() for w in weights]
    B, X = symmetric(2 * blocks, m, torch.bfloat16), randn(2 * blocks, m, n, dtype=torch.bfloat16)
    product.affine_onto(B, X, 1.5, Onto(stacks(weights, blocks), 0.9, torch.tensor(0.25, device=DEVICE)))
    D = 1.5 * X.double() + B.double() @ X.double()
    for w, old, d in zip(weights, before, D.split(blocks), strict=True):
        # One rounding into the weight, which the interpreter truncates to bf16, and fp32's of sums of up to 40 terms.
        rtol = torch.finfo(dtype).eps
        torch.testing.assert_close(w.double(), moved(old, d, 0.9, 0.25, blocks), rtol=rtol, atol=3e-6)


def test_weights_may_have_any_strides_and_begin_anywhere():
    m, n = 33, 40
    for layout in ("transposed", "sliced"):
        W = strided(randn(1, m, n), layout)
        around = W._base
        assert around is not None
        before, rest = W.clone(), around.isnan().sum()
        B, X = symmetric(1, m), randn(1, m, n)
        bucket = Bucket([around], (1, m, n), (0, W.stride(1), W.stride(2)), int(W.storage_offset()))
        product.affine_onto(B, X, 0.0, Onto(bucket, torch.tensor(1.0, device=DEVICE), 0.5))
        torch.testing.assert_close(W.double(), before.double() - 0.5 * (B.double() @ X.double()), rtol=1e-5, atol=1e-5)
        assert around.isnan().sum() == rest


@loud
def test_a_weight_whose_gradient_is_not_finite_stays():
    weights = [randn(5, 9) for _ in range(3)]
    before = [w.clone() for w in weights]
    B, X = symmetric(3, 5), randn(3, 5, 9)
    X[1, 0, 0] = torch.nan
    finite = [torch.tensor(flag, device=DEVICE) for flag in (True, False, True)]
    product.affine_onto(B, X, 1.0, Onto(stacks(weights, 1), 0.5, 1.0, finite))
    assert torch.equal(weights[1], before[1])
    for i in (0, 2):
        assert weights[i].isfinite().all()
        assert not torch.equal(weights[i], before[i])


@pytest.mark.parametrize("shape", ((5, 9), (40, 33)))
@pytest.mark.parametrize("flags", (False, True))
def test_weights_are_rounded_with_the_noise_of_eager_torch(shape, flags):
    fan_out, fan_in = shape
    m, n, blocks = min(shape), max(shape), 2
    # Integers, of which every sum is exact: the noise alone decides.
    integers = lambda *s: torch.randint(-4, 5, s, device=DEVICE).bfloat16()  # noqa: E731
    weights = [integers(blocks * fan_out, fan_in) * 32 for _ in range(2)]
    before = [w.clone() for w in weights]
    B, X = integers(2 * blocks, m, m), integers(2 * blocks, m, n)
    B = B + B.mT
    steps = [torch.tensor(7.0, device=DEVICE), torch.tensor(123456.0, device=DEVICE)]
    own = [3, 0xFFFFFFF0]
    finite = [torch.tensor(True, device=DEVICE)] * 2 if flags else None
    product.affine_onto(B, X, 1.0, Onto(stacks(weights, blocks), 0.5, 0.125, finite, list(zip(steps, own, strict=True))))
    D = X.double() + B.double() @ X.double()
    for w, old, d, step, number in zip(weights, before, D.split(blocks), steps, own, strict=True):
        wanted = moved(old, d, 0.5, 0.125, blocks)
        seed = step.to(torch.int64) * 0x9E3779B1 + number
        assert not torch.equal(wanted.bfloat16().double(), wanted)
        assert torch.equal(w, stochastic_bf16(wanted.float(), seed))


def test_directions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="affine_onto moves weights by directions of their shape"):
        product.affine_onto(symmetric(2, 5), randn(2, 5, 9), 1.0, Onto(stacks([randn(5, 8)] * 2, 1), 1.0, 1.0))
    with pytest.raises(ValueError, match="one for each block"):
        product.affine_onto(symmetric(3, 5), randn(3, 5, 9), 1.0, Onto(stacks([randn(5, 9)] * 2, 1), 1.0, 1.0))


# Which tile a program computes.


@triton.jit
def _places(tiles, rows, cols, count, high, RATIO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), count - 1)
    tile = tl.load(tiles + at)
    if RATIO:
        i, j = product_kernel.lower(tile, high, RATIO)
    else:
        i, j = product_kernel.triangular(tile)
    tl.store(rows + at, i)
    tl.store(cols + at, j)


def places(tiles: Tensor, high: int, ratio: int) -> tuple[Tensor, Tensor]:
    i, j = torch.empty_like(tiles), torch.empty_like(tiles)
    block = triton.next_power_of_2(min(len(tiles), 1 << 16))
    _places[(triton.cdiv(len(tiles), block),)](tiles, i, j, len(tiles), high, RATIO=ratio, BLOCK=block)
    return i.long(), j.long()


def test_the_triangular_root_is_exact_at_both_ends_of_every_row_that_int32_can_count():
    row = torch.arange(46340, device=DEVICE)
    first = row * (row + 1) // 2
    for column in (torch.zeros_like(row), row):
        i, j = places((first + column).int(), 0, 0)
        assert torch.equal(i, row)
        assert torch.equal(j, column)


@pytest.mark.parametrize("high", (1, 2, 7, 8, 9, 23, 500))
@pytest.mark.parametrize("ratio", (1, 2))
def test_every_tile_that_reaches_below_the_diagonal_is_some_programs(high, ratio):
    count = high * (high + 1) // 2 * ratio
    i, j = places(torch.arange(count, dtype=torch.int32, device=DEVICE), high, ratio)
    assert bool(((j >= 0) & (j < ratio * (i + 1)) & (i < high)).all())
    assert len(torch.unique(i * high * ratio + j)) == count


# Mistakes that must show.


@pytest.mark.skipif(DEVICE == "cuda", reason="one back-end is enough to test the tests")
@pytest.mark.parametrize(
    ("right", "wrong"),
    (
        ("if i != j:", "if i < j:"),
        ("value = tl.where(rows >= cols, value, tl.trans(value))", "pass"),
        ("acc += a * c.to(tl.float32)", "acc = a * c.to(tl.float32)"),
        ("deep = (depth < k - start) | EVEN_K", "deep = (depth < k - start - 1) | EVEN_K"),
        ("q += DEPTH * q_row", "q += 0"),
        ("out += batch * out_batch", "out += 0"),
    ),
)
def test_a_planted_mistake_is_found(right, wrong, monkeypatch, tmp_path):
    source = inspect.getsource(product_kernel)
    assert right in source
    (tmp_path / "mistaken.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mistaken", tmp_path / "mistaken.py")
    assert spec is not None
    assert spec.loader is not None
    mistaken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mistaken", mistaken)
    spec.loader.exec_module(mistaken)
    monkeypatch.setattr(product, "product", mistaken.product)
    with pytest.raises(AssertionError):
        test_products_of_any_shape_agree_with_fp64((2, 40, 33), torch.float32)
        test_symmetric_products_are_symmetric_to_the_bit(torch.bfloat16)
