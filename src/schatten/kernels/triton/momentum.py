"""Gradient to signal, for all matrices of a bucket in one launch: momentum, Nesterov, cast, transpose and norm.

Squares of fp32 numbers neither overflow nor vanish in fp64. A memory-bound kernel has time for one fp64 product an entry
even where a GPU has one fp64 unit for 64 of fp32, and so needs no maxima first.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from schatten.kernels.bucket import Bucket, Tables
from schatten.kernels.triton.tiles import entries, launch, pointer, tiled
from schatten.kernels.triton.weights import TYPES, addresses, aligned, loaded, moves, number

# Sums of tiles that a program of the second kernel adds at a time.
SUMS = 1024


def momentum_(
    G: Bucket,
    M: Bucket,
    finite: Sequence[Tensor] | None,
    *,
    beta: float | Tensor,
    form: Literal["ema", "sum"],
    nesterov: bool,
    scale: Tensor | None,
    maximize: bool,
    dtype: torch.dtype,
    wide: bool,
    tables: Tables,
) -> tuple[Tensor, Tensor]:
    """`signals.Momentum` of gradients G, into fp32 averages M: the signals S (matrices, m, n) and ||S||_F (matrices, 1, 1).

    S is in `dtype`, in the order of members and their blocks; with `wide`, tall matrices are transposed to m <= n. The norm
    is that of S as it is returned, as `solvers.core.frobenius` gives it. Gradients are divided by a GradScaler's `scale` and,
    with `maximize`, negated. `finite` has a flag () for each member; where it is false M is left as it is, and S is anything.
    """
    device, (blocks, fan_out, fan_in) = G.device, G.shape
    matrices, turned = len(G) * blocks, wide and fan_out > fan_in
    S = torch.empty(matrices, *((fan_in, fan_out) if turned else (fan_out, fan_in)), dtype=dtype, device=device)
    norm = torch.empty(matrices, 1, 1, dtype=torch.float32, device=device)
    if norm.numel() == 0:
        return S, norm
    if S.numel() == 0:
        return S, norm.fill_(1)
    own = (fan_out * fan_in, 1, fan_out) if turned else (fan_out * fan_in, fan_in, 1)
    tiling = tiled(fan_out, fan_in, G.strides, M.strides, own)
    g, m, s = tiling.strides
    starts = G.addresses() + M.addresses()
    values = starts if finite is None else starts + addresses(finite)
    squares = torch.empty(matrices, tiling.each, dtype=torch.float64, device=device)
    decay, decay_at = number(beta, device)
    divisor, divisor_at = number(1.0 if scale is None else scale, device)
    launch(
        _momentum,
        matrices * tiling.each,
        device,
        tables.of(values, torch.int64, device),
        S,
        squares,
        len(G),
        blocks,
        tiling.rows,
        tiling.columns,
        tiling.each,
        decay,
        # Of a number on the host the difference is rounded once.
        0.0 if decay_at else 1 - float(beta),
        divisor,
        *g,
        *m,
        *s,
        TYPE=TYPES[G.dtype],
        AVERAGE=form == "ema",
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        FINITE=finite is not None,
        DECAY_AT=decay_at,
        SCALED=scale is not None,
        SCALE_AT=divisor_at,
        ALIGNED=aligned(starts),
        HEIGHT=tiling.height,
        WIDTH=tiling.width,
    )
    launch(_norms, matrices, device, squares, norm, tiling.each, SUMS=SUMS, warps=4)
    return S, norm


@triton.jit(do_not_specialize=("members", "blocks", "tiles"))
def _momentum(
    table, S, squares, members, blocks, rows, columns, tiles, beta, rest, scale,
    g_block, g_row, g_column, m_block, m_row, m_column, s_matrix, s_row, s_column,
    TYPE: tl.constexpr, AVERAGE: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FINITE: tl.constexpr,
    DECAY_AT: tl.constexpr, SCALED: tl.constexpr, SCALE_AT: tl.constexpr, ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix."""
    program = tl.program_id(0)
    matrix = program // tiles
    member, block = matrix // blocks, (matrix % blocks).to(tl.int64)
    row, column, inside = entries(program % tiles, rows, columns, HEIGHT, WIDTH)  # pyright: ignore[reportGeneralTypeIssues]
    g = pointer(table, member, TYPE, ALIGNED) + block * g_block + row * g_row + column * g_column
    m = pointer(table + members, member, tl.float32, ALIGNED) + block * m_block + row * m_row + column * m_column
    G = tl.load(g, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(m, mask=inside, other=0.0)
    beta = loaded(beta, DECAY_AT)
    if DECAY_AT:
        rest = 1 - beta
    if SCALED:
        G = tl.div_rn(G, loaded(scale, SCALE_AT))
    if MAXIMIZE:
        G = -G
    M = _lerp(old, G, rest) if AVERAGE else G + beta * old
    result = M
    if NESTEROV:
        result = _lerp(G, M, beta) if AVERAGE else G + beta * M
    kept = inside
    if FINITE:
        kept = inside & moves(table + 2 * members, member)
    tl.store(m, M, mask=kept)
    result = result.to(S.dtype.element_ty)
    tl.store(S + matrix.to(tl.int64) * s_matrix + row * s_row + column * s_column, result, mask=inside)
    exact = result.to(tl.float32).to(tl.float64)
    tl.store(squares + program, tl.sum(tl.sum(exact * exact, axis=1), axis=0))


@triton.jit
def _lerp(start, end, weight):
    """As torch computes it: from the nearer end."""
    way = end - start
    return tl.where(tl.abs(weight) < 0.5, start + weight * way, end - way * (1 - weight))


@triton.jit(do_not_specialize=("tiles",))
def _norms(squares, norm, tiles, SUMS: tl.constexpr):
    """The norm of one matrix from the sums of its tiles, always added in the same order."""
    matrix = tl.program_id(0).to(tl.int64)
    total = tl.zeros((SUMS,), tl.float64)
    for start in range(0, tiles, SUMS):
        tile = start + tl.arange(0, SUMS)
        total += tl.load(squares + matrix * tiles + tile, mask=tile < tiles, other=0.0)
    found = tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)
    # The smallest normal number at least, and 1 for zero; nan compares as false and stays.
    safe = tl.where(found < 1.1754943508222875e-38, 1.1754943508222875e-38, found)
    tl.store(norm + matrix, tl.where(found == 0, 1.0, safe))
