"""Batching: equal blocks of parameters as stacks of logical matrices, and the way back into them.

Matrix products gain from large batches, elementwise work on a CPU from pieces that stay in its cache, so a batch is
made of parts: the signal and the retraction see a part, the map sees the batch. Where both work on entries alone, a
large matrix is cut into parts by rows.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from schatten import finite
from schatten.blockwise import decode, encode
from schatten.kernels import Tables
from schatten.kernels.choice import on_triton
from schatten.rounding import noisy, stochastic_bf16, store_
from schatten.state import COUNTERS, LOST, SCALES, Member, seeds, wide

# What a step may allocate beside state and gradients, by default: matrices are multiplied in batches that keep to it.
# Enough to fill the cores or the GPU, and below one and a half times the largest same-shape batch of GPT-2 small, 108 MiB.
MAX_BATCH_BYTES = 160 << 20

# And on a GPU, which is filled by larger batches: the matrices of GPT-2 small make one batch for each of their shapes.
MAX_GPU_BATCH_BYTES = 512 << 20

# Allocated per entry of a batch while its direction is computed, at most: for a tower in fp32 the signal, the sum, three
# iterates and three products of them. Half of it where products are bf16. `tests/facts/test_step_memory.py` measures it.
BYTES_PER_ENTRY = 32

# And per entry of state beyond one tensor of the matrix's shape: stacked, read and made anew. SOAP's 10.5 tensors on a
# 128 x 512 matrix take 132 bytes per entry of it.
STATE_BYTES = 12

# Entries of a part on a CPU (2 MiB in fp32), so that an operation finds in the cache what the one before it wrote. On
# other devices a part is the whole batch, which saves launches.
MAX_CPU_PART_ENTRIES = 1 << 19


# Entries up to which a CPU rounds the matrices of a part together: of larger ones the noise would leave its cache.
SMALL = 1 << 14

T = TypeVar("T")


def default_batch_bytes(devices: Sequence[torch.device]) -> int:
    """What a step of parameters there may allocate at a time, if nothing is said of it."""
    return MAX_GPU_BATCH_BYTES if any(device.type == "cuda" for device in devices) else MAX_BATCH_BYTES


def batches(
    members: Sequence[Member], max_batch_bytes: int, lean: Callable[[Tensor], int | None] | None = None
) -> Iterator[list[Member]]:
    """Members with blocks of one shape, dtype and device together, in batches that `max_batch_bytes` allows.

    `lean` gives the bytes per entry that kernels take for such parameters, if they step them; they need equal strides.
    """
    alike: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    apart = bool(members) and on_triton(members[0].p, products=False)
    for member in members:
        strides = _strides(member) if apart else ()
        alike[member.piece.blocks, member.p.dtype, member.p.device, strides].append(member)
    for same in alike.values():
        p, entries = same[0].p, _entries(same[0])
        if lean is not None and (entry_bytes := lean(p)) is not None:
            yield from _evenly(same, max(1, max_batch_bytes // (entry_bytes * max(1, entries))))
            continue
        kept = sum(t.numel() for key, t in same[0].state.items() if key not in COUNTERS) / max(1, p.numel())
        yield from in_batches(same, entries, kept, wide(p.dtype), p.device, max_batch_bytes)


def in_batches(
    same: list[T], entries: int, kept: float, dtype: torch.dtype, device: torch.device, max_batch_bytes: int
) -> list[list[T]]:
    """Equal blocks of `entries` each, with `kept` numbers of state for each entry, as many together as the bytes allow."""
    # A CPU gives each thread whole matrices: three on two threads take as long as four.
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    entry_bytes = BYTES_PER_ENTRY + STATE_BYTES * max(0.0, kept - 1)
    return _pieces(same, entries, int(max_batch_bytes * 4 / (entry_bytes * dtype.itemsize)), threads)


def _strides(member: Member) -> tuple[object, ...]:
    """What kernels want equal in a batch."""
    p, grad = member.p, member.p.grad
    return () if grad is None else (id(member.piece), p.stride(), grad.stride(), grad.dtype)


def _evenly(items: list[T], limit: int) -> list[list[T]]:
    """As few pieces as hold `limit` at most, of nearly one size, as a short one would leave most of a GPU idle."""
    count = -(-len(items) // limit)
    bounds = [len(items) * k // count for k in range(count + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


def _entries(member: Member) -> int:
    return math.prod(member.piece.blocks)


def _pieces(items: list[T], entries: int, limit: int, multiple: int = 1) -> list[list[T]]:
    size = max(1, limit // max(1, entries))
    size = max(1, size // multiple * multiple)
    return [items[start : start + size] for start in range(0, len(items), size)]


def parts(whole: "Part", by_rows: bool) -> list["Part"]:
    """A batch in the pieces its device prefers for elementwise work; large matrices by rows if `by_rows`."""
    members, blocks = whole.members, whole.blocks
    p, entries = members[0].p, _entries(members[0])
    if not finite.looking_is_free(p):
        return [whole]
    if entries <= MAX_CPU_PART_ENTRIES or not by_rows or p.dtype != wide(p.dtype) or not all(map(_in_rows, members)):
        pieces = _pieces(members, entries, MAX_CPU_PART_ENTRIES)
        return [whole] if len(pieces) == 1 else [Part(piece) for piece in pieces]
    rows, height = blocks[0] * blocks[1], max(1, MAX_CPU_PART_ENTRIES // blocks[2])
    slices = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
    return [Part([member], rows) for member in members for rows in slices]


def _in_rows(member: Member) -> bool:
    """Whether rows of the matrices are views of the parameter, its gradient and its state."""
    p, state = member.p, member.state
    assert p.grad is not None
    own = [t for key, t in state.items() if key not in COUNTERS]
    return member.piece.plain and all(t.is_contiguous() and t.dtype == p.dtype for t in (p, p.grad, *own))


class Room:
    """Memory for the signals of one batch after another: fresh pages cost a CPU as much as the arithmetic on them.

    And what kernels remember from step to step.
    """

    def __init__(self, tables: Tables | None = None) -> None:
        self.flat: Tensor | None = None
        self.tables = Tables() if tables is None else tables

    def like(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of `t`'s dtype and device; the one before it is overwritten."""
        size = math.prod(shape)
        flat = self.flat
        if flat is None or flat.numel() < size or flat.dtype != t.dtype or flat.device != t.device:
            self.flat = flat = t.new_empty(size)
        return flat[:size].view(shape)


def places(pieces: list["Part"]) -> Iterator[tuple["Part", slice]]:
    """Each part with the place of its parameters in the batch."""
    start = 0
    for part in pieces:
        yield part, slice(start, start + len(part))
        if part.rows is None or part.rows.stop == part.blocks[0] * part.blocks[1]:
            start += len(part)


class Part:
    """Members of one shape as stacks (members, blocks, fan_out, fan_in), or rows of one as (1, 1, rows, fan_in).

    What is written back is kept only where the gradient was finite: where the host may not look, a mask on the device
    chooses, so nothing waits.
    """

    def __init__(self, members: list[Member], rows: slice | None = None):
        self.members = members
        self.blocks = members[0].piece.blocks
        self.rows = rows
        self.dtype = wide(members[0].p.dtype)

    def __len__(self) -> int:
        return len(self.members)

    def _rows(self, t: Tensor) -> Tensor:
        """This part's rows of one contiguous tensor's matrices, all blocks below each other: (1, rows, fan_in), a view."""
        return t.view(-1, self.blocks[2])[self.rows].unsqueeze(0)

    def of(self, D: Tensor) -> Tensor:
        """This part of a tensor that holds its matrices, (members, blocks, fan_out, fan_in)."""
        return D if self.rows is None else self._rows(D[0].contiguous()).unsqueeze(0)

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        """Parameters, or tensors of their shape, as this part's stacks."""
        if self.rows is not None:
            return self._rows(tensors[0].detach()).to(self.dtype).unsqueeze(0)
        return _stack([m.piece.of(t.detach()).to(self.dtype) for m, t in zip(self.members, tensors, strict=True)])

    def gradients(self, maximize: bool, scale: Tensor | None) -> Tensor:
        """The gradients of what is to be minimised, divided by a GradScaler's `scale`."""
        G = self._stacked([m.p.grad for m in self.members if m.p.grad is not None])
        if scale is not None:
            G = G / scale.to(G)
        return -G if maximize else G

    def weights(self) -> Tensor:
        W = self._stacked([m.p for m in self.members])
        return W + self.state()[LOST] if LOST in self.members[0].state else W

    def state(self) -> "Stacks":
        return Stacks(self)

    def read(self, name: str) -> Tensor:
        """State `name` as a stack, in the precision of arithmetic."""
        if self.rows is not None and self.members[0].state[name].ndim:
            return self._rows(self.members[0].state[name]).to(self.dtype).unsqueeze(0)
        values = []
        for m in self.members:
            value = m.matrices(name)
            if value.dtype == torch.int8:
                value = decode(value, m.matrices(name + SCALES))
            values.append(value.to(self.dtype))
        return _stack(values)

    def keep_state_(self, new: Mapping[str, Tensor]) -> None:
        for name, values in new.items():
            for m, value in zip(self.members, values, strict=True):
                if self.rows is not None:
                    self._rows(m.state[name]).copy_(value)
                    continue
                target = m.place(name)
                if target.dtype == torch.int8:
                    value, scales = encode(value, m.seed(name))
                    keep_(m.place(name + SCALES), scales, m.finite)
                elif target.dtype == torch.bfloat16:
                    value = stochastic_bf16(value, m.seed(name))
                keep_(target, value, m.finite)

    def keep_weights_(self, new: Tensor, rounding: str) -> None:
        p = self.members[0].p
        if len(self) > 1 and noisy(p, rounding) and _entries(self.members[0]) <= SMALL and finite.looking_is_free(p):
            new, rounding = stochastic_bf16(new, seeds(self.members, "weight")), "nearest"
        for m, W in zip(self.members, new, strict=True):
            if self.rows is not None:
                self._rows(m.p.detach()).copy_(W[0])
                continue
            target = m.piece.view(m.p.detach())
            lost = m.place(LOST) if LOST in m.state else None
            W = W.reshape(target.shape)
            seed = m.seed("weight") if noisy(target, rounding) else 0
            if m.finite is None:
                store_(target, W, rounding, seed, lost)
                continue
            rounded, missed = torch.empty_like(target), None if lost is None else torch.empty_like(lost)
            store_(rounded, W, rounding, seed, missed)
            keep_(target, rounded, m.finite)
            if lost is not None and missed is not None:
                keep_(lost, missed, m.finite)


def _stack(matrices: list[Tensor]) -> Tensor:
    return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)


def keep_(place: Tensor, value: Tensor, finite: Tensor | None) -> None:
    """Write `value` into `place` where a flag on the device says so, and in any case if there is none."""
    value = value.reshape(place.shape)
    place.copy_(value if finite is None else torch.where(finite, value, place))


class Stacks(Mapping[str, Tensor]):
    """The state of a part as stacks (members, blocks, ...), each made when it is read: slots share one state."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __getitem__(self, key: str) -> Tensor:
        if key not in (member := self.part.members[0]).state and key + member.suffix not in member.state:
            raise KeyError(key)
        return self.part.read(key)

    def __iter__(self) -> Iterator[str]:
        member = self.part.members[0]
        return (key.removesuffix(member.suffix) for key in member.state)

    def __len__(self) -> int:
        return len(self.part.members[0].state)
