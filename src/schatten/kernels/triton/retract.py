"""Directions into the weights of a bucket, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from schatten.kernels.bucket import Onto
from schatten.kernels.triton.tiles import entries, launch, pointer, strides_of, tiled
from schatten.kernels.triton.weights import TYPES, land_, loaded, number, rows


def retract_(D: Tensor, onto: Onto) -> None:
    """W <- keep W - length D, rounded as `onto` says, for directions D (members * blocks, fan_out, fan_in)."""
    if D.numel() == 0:
        return
    weights, (blocks, fan_out, fan_in) = onto.weights, onto.weights.shape
    tiling = tiled(fan_out, fan_in, strides_of(D), weights.strides)
    table, aligned = rows(onto)
    keep, keep_at = number(onto.keep, D.device)
    length, length_at = number(onto.length, D.device)
    launch(
        _retract,
        len(D) * tiling.each,
        D.device,
        D,
        table,
        len(weights),
        blocks,
        tiling.rows,
        tiling.columns,
        tiling.each,
        keep,
        length,
        *tiling.strides[0],
        *tiling.strides[1],
        TYPE=TYPES[weights.dtype],
        FINITE=onto.finite is not None,
        NOISE=onto.noise is not None,
        KEEP_AT=keep_at,
        LENGTH_AT=length_at,
        ALIGNED=aligned,
        HEIGHT=tiling.height,
        WIDTH=tiling.width,
    )


@triton.jit(do_not_specialize=("members", "blocks", "tiles"))
def _retract(
    D, table, members, blocks, rows, columns, tiles, keep, length,
    d_matrix, d_row, d_column, w_block, w_row, w_column,
    TYPE: tl.constexpr, FINITE: tl.constexpr, NOISE: tl.constexpr, KEEP_AT: tl.constexpr, LENGTH_AT: tl.constexpr,
    ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix."""
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    member, block = matrix // blocks, matrix % blocks
    row, column, inside = entries(program % tiles, rows, columns, HEIGHT, WIDTH)  # pyright: ignore[reportGeneralTypeIssues]
    direction = tl.load(D + matrix * d_matrix + row * d_row + column * d_column, mask=inside, other=0.0).to(tl.float32)
    w = pointer(table, member, TYPE, ALIGNED) + block * w_block + row * w_row + column * w_column
    place = (block * rows + row) * columns + column
    keep, length = loaded(keep, KEEP_AT), loaded(length, LENGTH_AT)
    land_(w, direction, inside, place, table, member, members, keep, length, FINITE, NOISE)
