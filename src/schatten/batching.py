"""Batching: parameters of one shape as stacks of logical matrices, and the way back into them.

Matrix products gain from large batches, elementwise work on a CPU from pieces that stay in its cache, so a batch is
made of parts: the signal and the retraction see a part, the map sees the batch. Where both work on entries alone, a
large matrix is cut into parts by rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from schatten.rounding import store_

# What a step may allocate beside state and gradients, by default: matrices are multiplied in batches that keep to it.
# Enough to fill the cores or the GPU, and below one and a half times the largest same-shape batch of GPT-2 small, 108 MiB.
MAX_BATCH_BYTES = 160 << 20

# Allocated per entry of a batch while its direction is computed, at most: for a tower in fp32 the signal, the sum, three
# iterates and three products of them. Half of it where products are bf16. `tests/facts/test_step_memory.py` measures it.
BYTES_PER_ENTRY = 32

# And per entry of state beyond one tensor of the matrix's shape: stacked, read and made anew. SOAP's 10.5 tensors on a
# 128 x 512 matrix take 132 bytes per entry of it.
STATE_BYTES = 12

# Entries of a part on a CPU (2 MiB in fp32), so that an operation finds in the cache what the one before it wrote. On
# other devices a part is the whole batch, which saves launches.
MAX_CPU_PART_ENTRIES = 1 << 19

COUNTERS = ("step", "skipped")

Member = tuple[int, Tensor]

StatedMember = tuple[int, Tensor, dict[str, Tensor]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of state and arithmetic: the parameter's, but at least fp32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def looking_is_free(p: Tensor) -> bool:
    """Whether the host may look at a value without waiting for a device; where not, results are masked instead."""
    return p.device.type == "cpu"


def batches(
    members: Sequence[Member], max_batch_bytes: int, state: Mapping[Tensor, Mapping[str, Tensor]]
) -> Iterator[list[Member]]:
    """(index, parameter) pairs of one shape, dtype and device together, in batches that `max_batch_bytes` allows."""
    alike: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    for index, p in members:
        alike[p.shape, p.dtype, p.device].append((index, p))
    for same in alike.values():
        p = same[0][1]
        # A CPU gives each thread whole matrices: three on two threads take as long as four.
        threads = torch.get_num_threads() if looking_is_free(p) else 1
        kept = sum(t.numel() for key, t in state[p].items() if key not in COUNTERS) / max(1, p.numel())
        entry_bytes = BYTES_PER_ENTRY + STATE_BYTES * max(0.0, kept - 1)
        yield from _pieces(same, int(max_batch_bytes * 4 / (entry_bytes * wide(p.dtype).itemsize)), threads)


def _pieces(members: list[Any], entries: int, multiple: int = 1) -> list[list[Any]]:
    size = max(1, entries // max(1, members[0][1].numel()))
    size = max(1, size // multiple * multiple)
    return [members[start : start + size] for start in range(0, len(members), size)]


def parts(whole: "Part", by_rows: bool) -> list["Part"]:
    """A batch in the pieces its device prefers for elementwise work; large matrices by rows if `by_rows`."""
    p, blocks = whole.params[0], whole.blocks
    if not looking_is_free(p):
        return [whole]
    batch = list(zip(whole.indices, whole.params, whole.states, strict=True))
    if p.numel() <= MAX_CPU_PART_ENTRIES or not by_rows or p.dtype != wide(p.dtype) or not all(map(_in_rows, batch)):
        pieces = _pieces(batch, MAX_CPU_PART_ENTRIES)
        return [whole] if len(pieces) == 1 else [Part(members, blocks) for members in pieces]
    rows, height = blocks[0] * blocks[1], max(1, MAX_CPU_PART_ENTRIES // blocks[2])
    slices = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
    return [Part([member], blocks, rows) for member in batch for rows in slices]


def _in_rows(member: StatedMember) -> bool:
    """Whether rows of the matrices are views of the parameter, its gradient and its state."""
    _, p, state = member
    assert p.grad is not None
    return all(t.is_contiguous() for t in (p, p.grad, *state.values()))


class Room:
    """Memory for the signals of one batch after another: fresh pages cost a CPU as much as the arithmetic on them."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

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


def finite_gradient(p: Tensor) -> Tensor:
    """Whether the gradient is finite, on its device.

    A sum is inf or nan if an entry is, and the cheapest reduction there is. It is so too if finite entries add up beyond
    the dtype's range: such a gradient is skipped and counted as well.
    """
    assert p.grad is not None
    return p.grad.sum(dtype=wide(p.dtype)).isfinite()


def without_non_finite(batch: list[Member], state: Mapping[Tensor, dict[str, Tensor]]) -> list[Member]:
    """The members a step moves, on a CPU, where looking at a flag makes nothing wait; the others are counted."""
    flags = [bool(finite_gradient(p)) for _, p in batch]
    for (_, p), finite in zip(batch, flags, strict=True):
        state[p]["step" if finite else "skipped"].add_(1)
    return [member for member, finite in zip(batch, flags, strict=True) if finite]


class Part:
    """Parameters of one shape as stacks (parameters, blocks, fan_out, fan_in), or rows of one as (1, 1, rows, fan_in).

    On a CPU the gradients are known to be finite. Elsewhere what is written back is kept only where they were: a mask on
    the device chooses, so nothing waits.
    """

    def __init__(self, members: list[StatedMember], blocks: tuple[int, int, int], rows: slice | None = None):
        self.indices = [index for index, _, _ in members]
        self.params = [p for _, p, _ in members]
        self.states = [state for _, _, state in members]
        self.blocks = blocks
        self.rows = rows
        self.dtype = wide(self.params[0].dtype)
        self.finite = [None if looking_is_free(p) else finite_gradient(p) for p in self.params]

    def __len__(self) -> int:
        return len(self.params)

    def _view(self, t: Tensor) -> Tensor:
        """A parameter, its gradient or a tensor of its state with the dimension of blocks first."""
        if t.ndim == 0:
            return t.view(1, 1, 1)
        if t.shape == self.params[0].shape:
            return t.detach().reshape(self.blocks) if self.rows is None else self._rows(t.detach())
        return t.unsqueeze(0) if self.blocks[0] == 1 else t

    def _rows(self, t: Tensor) -> Tensor:
        """This part's rows of one contiguous tensor's matrices, all blocks below each other: (1, rows, fan_in), a view."""
        return t.view(-1, self.blocks[2])[self.rows].unsqueeze(0)

    def of(self, D: Tensor) -> Tensor:
        """This part of a tensor that holds its matrices, (parameters, blocks, fan_out, fan_in)."""
        return D if self.rows is None else self._rows(D[0].contiguous()).unsqueeze(0)

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        matrices = [self._view(t).to(self.dtype) for t in tensors]
        return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)

    def gradients(self, maximize: bool) -> Tensor:
        """The gradients of what is to be minimised."""
        G = self._stacked([p.grad for p in self.params if p.grad is not None])
        return -G if maximize else G

    def weights(self) -> Tensor:
        return self._stacked(self.params)

    def state(self) -> "Stacks":
        return Stacks(self)

    def count_(self) -> None:
        """Count this step, or its skipping; on a CPU `without_non_finite` has done so."""
        for s, finite in zip(self.states, self.finite, strict=True):
            if finite is not None:
                s["step"].add_(finite)
                s["skipped"].add_(~finite)

    def keep_state_(self, new: Mapping[str, Tensor]) -> None:
        for key, values in new.items():
            for s, value, finite in zip(self.states, values, self.finite, strict=True):
                if finite is None:
                    target = self._view(s[key])
                    target.copy_(value.reshape(target.shape))
                else:
                    torch.where(finite, value.reshape(s[key].shape), s[key], out=s[key])

    def keep_weights_(self, new: Tensor, rounding: str, seeds: list[int]) -> None:
        for p, W, finite, seed in zip(self.params, new, self.finite, seeds, strict=True):
            if self.rows is not None:
                self._rows(p.detach()).copy_(W[0])
                continue
            W = W.reshape(p.shape)
            if finite is not None:
                W = torch.where(finite, W, p.to(self.dtype))
            store_(p, W, rounding, seed)


class Stacks(Mapping[str, Tensor]):
    """The state of a part as stacks (parameters, blocks, ...), each made when it is read: slots share one state."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __getitem__(self, key: str) -> Tensor:
        return self.part._stacked([s[key] for s in self.part.states])

    def __iter__(self) -> Iterator[str]:
        return iter(self.part.states[0])

    def __len__(self) -> int:
        return len(self.part.states[0])
