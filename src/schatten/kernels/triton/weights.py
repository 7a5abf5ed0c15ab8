"""How a direction enters a weight inside a kernel: W <- keep W - length D, rounded as the parameter asks.

Kernels take `rows(onto)`, one table with everything they must know of each member, and the two numbers as `number` passes
them. `land_` does the rest for a tile. The noise is that of `schatten.rounding`, bit for bit, so that a step gives the same
weights whichever back-end computes it.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from schatten.kernels.bucket import Onto

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Bytes a thread moves at best in one access; a kernel may count on it where every address is a multiple.
ALIGNMENT = 16


def rows(onto: Onto) -> tuple[Tensor, bool]:
    """A table (rows x members,) int64, and whether all matrices begin at a multiple of 16 bytes.

    The rows are the addresses of the weights; of the flags, if any (`moves` reads them); and of the counters with the
    members' own numbers, if noise is asked for (`seed` reads those). Counters are fp32.
    """
    weights = onto.weights.addresses()
    values = weights
    if onto.finite is not None:
        values += addresses(onto.finite)
    if onto.noise is not None:
        values += noise_rows(onto.noise)
    return onto.tables.of(values, torch.int64, onto.weights.device), aligned(weights)


def noise_rows(noise: Sequence[tuple[Tensor, int]]) -> tuple[int, ...]:
    """Two rows of a table: the addresses of the counters, and the members' own numbers."""
    return (*addresses([step for step, _ in noise]), *(own for _, own in noise))


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    # A step asks for hundreds: a loop in Python takes a third longer.
    return tuple(map(Tensor.data_ptr, tensors))


def aligned(starts: Sequence[int]) -> bool:
    """Whether matrices that begin at these addresses can be read 16 bytes at a time."""
    return math.gcd(ALIGNMENT, *starts) == ALIGNMENT


def number(x: float | Tensor, device: torch.device) -> tuple[float | Tensor, bool]:
    """`x` as a kernel takes it, and whether it must be loaded there: a number on the host is passed by value."""
    if isinstance(x, Tensor) and x.device == device:
        return x, True
    return float(x), False


@triton.jit
def loaded(x, AT: tl.constexpr):
    """The fp32 number that `number` passed, with its second value as AT."""
    if AT:
        x = tl.load(x).to(tl.float32)
    return x


@triton.jit
def moves(table, member):
    """Whether the step may move a member, read in the table's row of flags, which begins at `table`."""
    return tl.load(tl.load(table + member).to(tl.pointer_type(tl.int8))) != 0


@triton.jit
def seed(table, member, members):
    """The low 32 bits of `Member.seed`, from the two rows of noise, which begin at `table`."""
    step = tl.load(tl.load(table + member).to(tl.pointer_type(tl.float32)))
    return (step.to(tl.int64) * 0x9E3779B1 + tl.load(table + members + member)).to(tl.int32)


@triton.jit
def stochastic(value, place, seed):
    """fp32 `value` rounded at random to what bf16 holds, as `rounding.stochastic_bf16` does with `seed`, an int32.

    `place` is the entry's index in the matrix's own order (blocks, fan_out, fan_in).
    """
    hashed = _mixed(place.to(tl.int32).to(tl.uint32, bitcast=True) + _mixed(seed.to(tl.uint32, bitcast=True)))
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + (hashed & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, value)


@triton.jit
def _mixed(x):
    """`rounding`'s mixer of 32 bits, on uint32, where shifts bring in zeros."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def land_(w, D, inside, place, table, member, members, keep, length, FINITE: tl.constexpr, NOISE: tl.constexpr):
    """W <- keep W - length D on a tile: pointers `w`, fp32 `D`, a mask, and the entries' places, of the same shape.

    `table` is that of `rows`, with `members` entries in each row, and FINITE and NOISE say which rows it has.
    """
    if FINITE:
        inside = inside & moves(table + members, member)
    new = keep * tl.load(w, mask=inside, other=0.0).to(tl.float32) - length * D
    if NOISE:
        new = stochastic(new, place, seed(table + (2 * members if FINITE else members), member, members))
    tl.store(w, new.to(w.dtype.element_ty), mask=inside)
