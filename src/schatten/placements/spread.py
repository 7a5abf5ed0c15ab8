"""Spread: the blocks of one tensor over the ranks of a group, and which rectangle of a block each rank holds.

A tensor is read as (lead, rows, columns), its dimensions in the order of its layout; a block is one lead index with some
of the rows and columns. What a rank holds is a product along dimensions, so its part of a block is a rectangle.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from schatten.layout import Layout, Piece, pieces, rows_and_columns
from schatten.placements.regions import Arrangement, Indices, joined


@dataclass(frozen=True)
class Reading:
    """A tensor as a stack (lead, rows, columns): its dimensions in `order`, the first `lead` and the next `rows` of them.

    Example:
        >>> import torch
        >>> from schatten.placements.spread import Reading
        >>> columns_first = Reading((1, 0), lead=0, rows=1)
        >>> stack = columns_first.stack(torch.arange(6).view(2, 3))
        >>> stack.shape, columns_first.unstack(stack, (2, 3)).tolist()
        (torch.Size([1, 3, 2]), [[0, 1, 2], [3, 4, 5]])
    """

    order: tuple[int, ...]
    lead: int
    rows: int

    def stack(self, t: Tensor) -> Tensor:
        """`t`, which may be one rank's part of a tensor, as (lead, rows, columns); a view where memory allows it."""
        return t.permute(self.order).reshape(self._stacked(t.shape))

    def _stacked(self, sizes: Sequence[int]) -> list[int]:
        return [math.prod(sizes[d] for d in dims) for dims in self._cuts()]

    def _cuts(self) -> list[tuple[int, ...]]:
        ends = (0, self.lead, self.lead + self.rows, len(self.order))
        return [self.order[a:b] for a, b in itertools.pairwise(ends)]

    def empty(self, sizes: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised stack of a part with these sizes."""
        return like.new_empty(self._stacked(sizes))

    def unstack(self, stack: Tensor, shape: Sequence[int]) -> Tensor:
        """A stack of a tensor of `shape` in that shape again; a view."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return stack.reshape([shape[d] for d in self.order]).permute(back)

    def held(self, shape: Sequence[int], indices: Sequence[Indices]) -> tuple[Indices, Indices, Indices]:
        """Indices along each dimension of a tensor of `shape` as indices of its stack."""
        lead, rows, columns = (_flattened([(shape[d], indices[d]) for d in dims]) for dims in self._cuts())
        return lead, rows, columns


def _flattened(dims: Sequence[tuple[int, Indices]]) -> Indices:
    """Row-major indices of a product of indices along dimensions of these sizes."""
    found: Indices = range(1)
    for size, indices in dims:
        if indices == range(size) and isinstance(found, range):
            found = range(found.start * size, found.stop * size)
        else:
            found = joined([range(i * size + j, i * size + j + 1) for i in found for j in indices])
    return found


class Block(NamedTuple):
    """One logical matrix: the lead index, the rows and the columns of its tensor's stack, and its `shape`."""

    lead: int
    rows: Indices
    columns: Indices
    shape: tuple[int, ...]


class Cut(NamedTuple):
    """A rank's rectangle of a block: where it is in the stack that the rank holds, and where in the block."""

    lead: int
    here: tuple[Indices, Indices]
    there: tuple[Indices, Indices]

    @property
    def entries(self) -> int:
        return len(self.there[0]) * len(self.there[1])

    def of_stack(self, stack: Tensor) -> Tensor:
        """The rectangle of a rank's stack (lead, rows, columns)."""
        return rectangle(stack[self.lead], *self.here)

    def of_block(self, block: Tensor) -> Tensor:
        return rectangle(block, *self.there)

    def into_stack_(self, stack: Tensor, values: Tensor) -> None:
        write_(stack[self.lead], *self.here, values)

    def into_block_(self, block: Tensor, values: Tensor) -> None:
        write_(block, *self.there, values)


def rectangle(t: Tensor, rows: Indices, columns: Indices) -> Tensor:
    """Those rows and columns of a matrix; a view if both are ranges."""
    for dim, along in ((-2, rows), (-1, columns)):
        if not isinstance(along, range):
            t = t.index_select(dim, torch.tensor(along, device=t.device))
        elif len(along) != t.shape[dim]:
            t = t.narrow(dim, along.start, len(along))
    return t


def write_(t: Tensor, rows: Indices, columns: Indices, values: Tensor) -> None:
    """Write `values`, row by row, to those rows and columns of a matrix."""
    values = values.view(len(rows), len(columns))
    if isinstance(rows, range) and isinstance(columns, range):
        rectangle(t, rows, columns).copy_(values)
        return
    at = [torch.tensor(tuple(along), device=t.device) for along in (rows, columns)]
    t[at[0].unsqueeze(1), at[1]] = values


@dataclass(frozen=True)
class Spread:
    """A tensor of `shape`, read by `reading` as `blocks`, arranged on ranks by `on`."""

    shape: tuple[int, ...]
    reading: Reading
    blocks: tuple[Block, ...]
    on: Arrangement

    def cut(self, block: int, rank: int) -> Cut | None:
        """The rectangle of a block that `rank` holds, None if it holds nothing of it."""
        own = self.blocks[block]
        lead, rows, columns = _stack_held(self.reading, self.shape, self.on, rank)
        if own.lead not in lead:
            return None
        here_rows, there_rows = _overlap(own.rows, rows)
        here_columns, there_columns = _overlap(own.columns, columns)
        if not len(there_rows) or not len(there_columns):
            return None
        return Cut(lead.index(own.lead), (here_rows, here_columns), (there_rows, there_columns))

    def holders(self, block: int) -> tuple[int, ...]:
        """The ranks that hold all of a block."""
        own = self.blocks[block]
        wanted = len(own.rows) * len(own.columns)
        cuts = ((rank, self.cut(block, rank)) for rank in sorted(self.on.order))
        return tuple(rank for rank, cut in cuts if cut is not None and cut.entries == wanted)


@lru_cache(maxsize=16384)
def _stack_held(reading: Reading, shape: tuple[int, ...], on: Arrangement, rank: int) -> tuple[Indices, Indices, Indices]:
    return reading.held(shape, on.held(shape, rank))


@lru_cache(maxsize=16384)
def _overlap(wanted: Indices, held: Indices) -> tuple[Indices, Indices]:
    """What is in both, as places in `held` and as places in `wanted`."""
    if isinstance(wanted, range) and isinstance(held, range):
        start, stop = max(wanted.start, held.start), min(wanted.stop, held.stop)
        stop = max(start, stop)
        return range(start - held.start, stop - held.start), range(start - wanted.start, stop - wanted.start)
    places = {i: place for place, i in enumerate(held)}
    common = [(places[i], place) for place, i in enumerate(wanted) if i in places]
    return joined([range(a, a + 1) for a, _ in common]), joined([range(b, b + 1) for _, b in common])


# -- what there is to spread ---------------------------------------------------------------------------------------------


def of_parameter(piece: Piece, on: Arrangement) -> Spread:
    """Equal blocks of a parameter, in the order of `Piece.of`."""
    return Spread(piece.shape, reading(piece.layout, piece.shape), _blocks(piece), on)


def of_state(shape: tuple[int, ...], blocks: int, on: Arrangement, dim: int = 0) -> Spread:
    """A state tensor of its own shape, cut along `dim`: a row for each of several blocks, or all of it for a single one."""
    whole = Reading(tuple(range(len(shape))), 0, min(dim + 1, len(shape)))
    rows, columns = (math.prod(shape[: dim + 1]), math.prod(shape[dim + 1 :]))
    if blocks == 1:
        own = (Block(0, range(rows), range(columns), shape[dim:]),)
    else:
        own = tuple(Block(0, range(b, b + 1), range(columns), shape[dim + 1 :]) for b in range(blocks))
    return Spread(shape, whole, own, on.cut_along(dim) if shape else on.alike())


@lru_cache(maxsize=4096)
def reading(layout: Layout, shape: tuple[int, ...]) -> Reading:
    """How a layout reads a tensor of `shape`, and any rank's part of it."""
    if layout.kind == "flat":
        return Reading(tuple(range(len(shape))), 0, 0)
    # Strides that name the dimensions come out in the order in which the layout reads them.
    named = torch.empty_strided([1] * len(shape), list(range(1, len(shape) + 1)), device="meta")
    read, lead = rows_and_columns(named, layout)
    return Reading(tuple(n - 1 for n in read.stride()), lead, 1)


@lru_cache(maxsize=4096)
def _blocks(piece: Piece) -> tuple[Block, ...]:
    shape = piece.shape
    lead, rows, columns = reading(piece.layout, shape).held(shape, [range(n) for n in shape])
    if piece.plain:
        return tuple(Block(i, rows, columns, piece.blocks[1:]) for i in lead)
    by_rows = piece.layout.axis == "fan_out"
    length = len(rows) if by_rows else shape[_fan_in_dim(piece)]
    kernel = 1 if by_rows else len(columns) // length
    # The axis alone, cut as the layout cuts it: one number for each row (or channel).
    axis = torch.arange(length).unsqueeze(1)
    alone = replace(piece.layout, kind="matrix", axis="fan_out", transpose=False)
    (cut,) = [p for p in pieces(alone, (length, 1)) if p.offset == piece.offset]
    found = []
    for places in cut.of(axis).squeeze(-1).tolist():
        along = joined([range(i * kernel, (i + 1) * kernel) for i in places])
        found.append((along, columns) if by_rows else (rows, along))
    return tuple(Block(i, *at, shape=piece.blocks[1:]) for i in lead for at in found)


def _fan_in_dim(piece: Piece) -> int:
    """The parameter's dimension that its layout reads as fan_in, without those of a kernel."""
    read = reading(piece.layout, piece.shape)
    return read.order[read.lead + 1]
