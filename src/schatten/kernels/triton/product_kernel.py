"""One kernel for every product: b P Q + a C for a batch of matrices, one tile (ROWS, COLS) of a result in each program.

Tiles of a result known to be symmetric are computed on and below the diagonal and stored a second time, mirrored. What
becomes of a result besides is done where it is made: a share of it is added to a sum, or it moves a weight.
"""

import triton
import triton.language as tl

from schatten.kernels.triton.tiles import pointer
from schatten.kernels.triton.weights import land_, loaded

# Tile rows that are worked through column by column before the next ones: programs that run at the same time then share
# the rows and columns they read, and find them in the L2 cache.
GROUP = tl.constexpr(8)


# What differs between buckets of equal matrices is no reason to compile anew.
@triton.jit(do_not_specialize=("members", "blocks"))
def product(
    P,
    Q,
    C,
    out,
    total,
    weight,
    m,
    n,
    k,
    a,
    b,
    p_batch,
    p_row,
    p_col,
    q_batch,
    q_row,
    q_col,
    c_batch,
    c_row,
    c_col,
    out_batch,
    out_row,
    out_col,
    total_batch,
    total_row,
    total_col,
    weight_batch,
    table,
    keep,
    length,
    members,
    blocks,
    w_block,
    w_row,
    w_col,
    W_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TALL: tl.constexpr,
    FINITE: tl.constexpr,
    NOISE: tl.constexpr,
    WEIGHT_AT: tl.constexpr,
    KEEP_AT: tl.constexpr,
    LENGTH_AT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`out` <- b P Q + a C for P (batch, m, k), Q (batch, k, n) and C, out (batch, m, n) in any strides; b or C may be None.

    `total` (batch, m, n) in fp32 grows by `weight`, or by the numbers `weight_batch` apart there, times the rounded result.

    With a `table` of `weights.rows` instead of `out`, W <- keep W - length (b P Q + a C), the direction unrounded. W is of type
    W_TYPE, at its member's address plus `w_block` entries for each block; batch = member * blocks + block. A TALL one is (n, m)
    itself, and its strides those of its transpose. The flags *_AT say which numbers lie in memory.
    """
    i, j, batch = place(m, n, SYMMETRIC, ROWS, COLS)  # pyright: ignore[reportGeneralTypeIssues]
    rows, cols, depth = i * ROWS + tl.arange(0, ROWS), j * COLS + tl.arange(0, COLS), tl.arange(0, DEPTH)
    # With a constant True the compiler drops the mask.
    row_inside, col_inside = ((rows < m) | EVEN_M)[:, None], ((cols < n) | EVEN_N)[None, :]
    inside = row_inside & col_inside
    rows, cols = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    p = P + batch * p_batch + rows * p_row + depth.to(tl.int64)[None, :] * p_col
    q = Q + batch * q_batch + depth.to(tl.int64)[:, None] * q_row + cols * q_col
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        deep = (depth < k - start) | EVEN_K
        x = tl.load(p, mask=row_inside & deep[None, :], other=0.0)
        y = tl.load(q, mask=deep[:, None] & col_inside, other=0.0)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        p += DEPTH * p_col
        q += DEPTH * q_row
    if b is not None:
        acc *= b
    if C is not None:
        c = tl.load(C + batch * c_batch + rows * c_row + cols * c_col, mask=inside, other=0.0)
        acc += a * c.to(tl.float32)
    if table is not None:
        member, block = batch // blocks, batch % blocks
        w = pointer(table, member, W_TYPE, ALIGNED) + block * w_block + rows * w_row + cols * w_col
        entry = block * m * n + (cols * m + rows if TALL else rows * n + cols)
        land_(w, acc, inside, entry, table, member, members, loaded(keep, KEEP_AT), loaded(length, LENGTH_AT), FINITE, NOISE)
    else:
        value = nearest(acc, out.dtype.element_ty, WIDEN)
        out += batch * out_batch
        share = None
        if total is not None:
            total += batch * total_batch
            share = loaded(weight + batch * weight_batch if WEIGHT_AT else weight, WEIGHT_AT)
        if not SYMMETRIC:
            put(out, out_row, out_col, total, total_row, total_col, share, rows, cols, value, inside)
        # P Q is symmetric only up to rounding: of a pair, the entry below the diagonal decides for both.
        elif ROWS == COLS:
            if i == j:
                value = tl.where(rows >= cols, value, tl.trans(value))
            put(out, out_row, out_col, total, total_row, total_col, share, rows, cols, value, inside)
            if i != j:
                put(out, out_row, out_col, total, total_row, total_col, share, cols, rows, value, inside)
        else:
            # Only tiles on the diagonal pay for masks of single entries.
            if (j + 1) * COLS > i * ROWS:
                below, above = inside & (rows >= cols), inside & (rows > cols)
                put(out, out_row, out_col, total, total_row, total_col, share, rows, cols, value, below)
                put(out, out_row, out_col, total, total_row, total_col, share, cols, rows, value, above)
            else:
                put(out, out_row, out_col, total, total_row, total_col, share, rows, cols, value, inside)
                put(out, out_row, out_col, total, total_row, total_col, share, cols, rows, value, inside)


@triton.jit
def put(out, out_row, out_col, total, total_row, total_col, share, row, col, value, inside):
    """`value` to these rows and columns of one matrix, and `share` of it to another's."""
    tl.store(out + row * out_row + col * out_col, value, mask=inside)
    if total is not None:
        at = total + row * total_row + col * total_col
        tl.store(at, tl.load(at, mask=inside, other=0.0) + share * value.to(tl.float32), mask=inside)


@triton.jit
def nearest(x, TYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """fp32 `x` rounded to the nearest of TYPE; the interpreter would truncate to bf16, so there it is done BY_HAND."""
    if BY_HAND:
        if TYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            x = tl.where(x == x, ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


@triton.jit
def place(m, n, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(tile row, tile column, matrix) of this program: the tiles of a matrix in groups of GROUP rows, then the next one's."""
    high = tl.cdiv(m, ROWS)
    if SYMMETRIC:
        tiles = high * (high + 1) // 2 * (ROWS // COLS)
    else:
        tiles = high * tl.cdiv(n, COLS)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    if SYMMETRIC:
        i, j = lower(tile, high, ROWS // COLS)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        wide = tl.cdiv(n, COLS)
        first = tile // (GROUP * wide) * GROUP
        tall = tl.minimum(high - first, GROUP)
        i, j = first + (tile - first * wide) % tall, (tile - first * wide) // tall
    return i, j, batch


@triton.jit
def lower(tile, high, RATIO: tl.constexpr):
    """(i, j) of a tile that reaches below the diagonal, of `high` tile rows with 0 <= j < RATIO (i + 1).

    A group has the columns before its first row's diagonal, each with all of its rows, and then the rest, row by row.
    """
    row, _ = triangular(tile // RATIO)  # pyright: ignore[reportGeneralTypeIssues]
    first = row // GROUP * GROUP
    tall = tl.minimum(high - first, GROUP)
    inner = tile - first * (first + 1) // 2 * RATIO
    rest = inner - first * tall * RATIO
    i, _ = triangular(tl.maximum(rest, 0) // RATIO)  # pyright: ignore[reportGeneralTypeIssues]
    j = first * RATIO + rest - i * (i + 1) // 2 * RATIO
    return first + tl.where(rest < 0, inner % tall, i), tl.where(rest < 0, inner // tall, j)


@triton.jit
def triangular(index):
    """(i, j) with index = i (i + 1) / 2 + j and 0 <= j <= i, for i below 46340."""
    # The root in fp32 is off by less than one.
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    return i, index - i * (i + 1) // 2
