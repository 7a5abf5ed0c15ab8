"""Matrices divided by a number each, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from schatten.kernels.triton.tiles import entries, launch, strides_of, tiled


def quotient(X: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """`X / divisor` per matrix, (b, m, n) and (b, 1, 1), divided in fp32 and rounded once, in X's memory layout."""
    Y = torch.empty_like(X, dtype=dtype)
    if Y.numel() == 0:
        return Y
    # A tall matrix seen as wide is a long row as well.
    x, y = (X, Y) if X.stride(2) == 1 else (X.mT, Y.mT)
    tiling = tiled(x.shape[1], x.shape[2], strides_of(x), strides_of(y))
    launch(
        _quotient,
        len(X) * tiling.each,
        X.device,
        X,
        divisor,
        Y,
        tiling.rows,
        tiling.columns,
        tiling.each,
        divisor.stride(0),
        *tiling.strides[0],
        *tiling.strides[1],
        HEIGHT=tiling.height,
        WIDTH=tiling.width,
    )
    return Y


@triton.jit(do_not_specialize=("tiles",))
def _quotient(
    X, divisor, Y, rows, columns, tiles, d_matrix, x_matrix, x_row, x_column, y_matrix, y_row, y_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix."""
    program = tl.program_id(0)
    matrix = (program // tiles).to(tl.int64)
    row, column, inside = entries(program % tiles, rows, columns, HEIGHT, WIDTH)  # pyright: ignore[reportGeneralTypeIssues]
    x = tl.load(X + matrix * x_matrix + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    result = tl.div_rn(x, tl.load(divisor + matrix * d_matrix).to(tl.float32)).to(Y.dtype.element_ty)
    tl.store(Y + matrix * y_matrix + row * y_row + column * y_column, result, mask=inside)
