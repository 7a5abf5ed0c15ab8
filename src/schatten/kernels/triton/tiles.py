"""Tiles of element-wise kernels: 4096 entries of a matrix, in a shape that all tensors of a kernel are read well in.

Where every tensor has the matrix's rows behind each other, the matrix is one long row. Otherwise tiles are squares, so that
a tensor with its columns behind each other is read as well as one with its rows: the compiler gives each access the order
of its own strides, and turns the tile over in shared memory between two.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FLAT = (1, 4096)
SQUARE = (64, 64)
WARPS = 8

Strides = tuple[int, int, int]


class Tiling(NamedTuple):
    """A stack of matrices as kernels see it: (rows, columns) in tiles of (height, width), and each tensor's strides."""

    rows: int
    columns: int
    height: int
    width: int
    strides: tuple[Strides, ...]

    @property
    def each(self) -> int:
        """Tiles of one matrix."""
        return -(-self.rows // self.height) * -(-self.columns // self.width)


def strides_of(X: Tensor) -> Strides:
    """Those of a stack (matrices, rows, columns)."""
    return X.stride(0), X.stride(1), X.stride(2)


def tiled(rows: int, columns: int, *strides: Strides) -> Tiling:
    """Tiles for stacks of such matrices in tensors with these `strides`, along matrices, rows and columns."""
    if all((columns == 1 or c == 1) and (rows == 1 or r == columns) for _, r, c in strides):
        return Tiling(1, rows * columns, *FLAT, tuple((b, 0, 1) for b, _, _ in strides))
    return Tiling(rows, columns, *SQUARE, strides)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int = WARPS, **constants: Any) -> None:
    """Start programs of a kernel on `device`, as torch's own operations do whichever device is current."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, num_warps=warps, **constants)


@triton.jit
def entries(tile, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's rows (HEIGHT, 1) and columns (1, WIDTH), int64, and the mask of those inside the matrix."""
    # Not tl.cdiv, whose sum overflows for a long row of almost 2^31 entries.
    across = (columns - 1) // WIDTH + 1
    row = (tile // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = (tile % across).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def pointer(table, member, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor of TYPE whose address is entry `member` of a table; ALIGNED promises multiples of 16 bytes."""
    start = tl.load(table + member).to(tl.pointer_type(TYPE))  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start
