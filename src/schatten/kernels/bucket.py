"""Buckets: equal matrices that lie anywhere in memory, for kernels that serve all of them in one launch.

A kernel finds matrix i of a bucket at an address it reads from a table on the device. `Tables` remembers the tables of the
last steps, so that nothing is copied as long as the allocator gives gradients the same places again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A few launches for hundreds of numbers, which are arguments of the launch.
ADD = torch.ops.aten._foreach_add_.ScalarList

# Tables remembered: those of a step, of all buckets of a large model.
REMEMBERED = 512


@dataclass(frozen=True)
class Bucket:
    """Stacks (blocks, fan_out, fan_in) of one shape, one in each of `tensors`, of one dtype and device.

    The first entry of each lies `offset` entries into its tensor, and `strides` (in entries) lead from there along blocks,
    rows and columns.
    """

    tensors: Sequence[Tensor]
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    offset: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def __len__(self) -> int:
        return len(self.tensors)

    def addresses(self) -> tuple[int, ...]:
        start = self.offset * self.dtype.itemsize
        return tuple(t.data_ptr() + start for t in self.tensors)


class Tables:
    """Numbers on a device, made there once for each set of values.

    They travel as arguments of launches, not from the host's memory: nothing waits, and a captured CUDA graph makes them
    again in each replay. What is made while a graph is captured holds nothing before, so it is kept but not used again.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._captured: list[Tensor] = []

    def of(self, values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`values` as a tensor (n,)."""
        key = (values, dtype, device)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._known.get(key)
        if found is None:
            found = _made(values, dtype, device)
            if not capturing:
                self._known[key] = found
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        if capturing:
            self._captured.append(found)
        return found

    def addresses(self, *buckets: Sequence[Tensor] | Bucket) -> Tensor:
        """(buckets x members,) int64: the addresses of each bucket's members in turn; plain tensors from their first entry."""
        own = [b.addresses() if isinstance(b, Bucket) else tuple(t.data_ptr() for t in b) for b in buckets]
        first = buckets[0]
        device = first.device if isinstance(first, Bucket) else first[0].device
        return self.of(tuple(a for one in own for a in one), torch.int64, device)


def _made(values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    table = torch.zeros(len(values), dtype=dtype, device=device)
    if values:
        ADD(list(table.unbind()), list(values))
    return table


@dataclass(frozen=True)
class Onto:
    """Where a direction goes: W <- keep W - length D for every matrix of a bucket, if its gradient was finite.

    `keep` and `length` are numbers or tensors () on the device. `finite` has a bool tensor () for each member, or is None.
    `noise` asks for stochastic rounding into bf16: for each member its counter of steps and its own number, as
    `schatten.state.Member.seed` makes a seed of both; None rounds to nearest. Directions come as (members * blocks, fan_out,
    fan_in), in any strides.
    """

    weights: Bucket
    keep: float | Tensor
    length: float | Tensor
    finite: Sequence[Tensor] | None = None
    noise: Sequence[tuple[Tensor, int]] | None = None
    tables: Tables = field(default_factory=Tables)
