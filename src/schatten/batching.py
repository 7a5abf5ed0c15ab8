"""Batching: parameters of one shape as stacks of logical matrices, and the way back into them.

Matrix products gain from large batches, elementwise work on a CPU from pieces that stay in its cache, so a batch is
made of parts: the signal and the retraction see a part, the map sees the batch.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from schatten.rounding import store_

# Matrices multiplied together, in entries (32 MiB in fp32): enough to fill the cores or the GPU, little enough that a
# step's temporaries stay small beside the model.
MAX_BATCH_ENTRIES = 1 << 23

# Entries of a part on a CPU (4 MiB in fp32): larger temporaries leave the cache, and those above 32 MiB also cost a
# page fault for every 4 KiB each time. On other devices a part is the whole batch, which saves launches.
MAX_CPU_PART_ENTRIES = 1 << 20

COUNTERS = ("step", "skipped")

Member = tuple[int, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of state and arithmetic: the parameter's, but at least fp32."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def batches(members: Sequence[Member]) -> Iterator[list[Member]]:
    """(index, parameter) pairs of one shape, dtype and device together, in batches of at most MAX_BATCH_ENTRIES."""
    alike: dict[tuple[object, ...], list[Member]] = defaultdict(list)
    for index, p in members:
        alike[p.shape, p.dtype, p.device].append((index, p))
    for same in alike.values():
        # A CPU gives each thread whole matrices: three on two threads take as long as four.
        yield from _pieces(same, MAX_BATCH_ENTRIES, torch.get_num_threads() if same[0][1].device.type == "cpu" else 1)


def parts(batch: list[Member]) -> Iterator[list[Member]]:
    """A batch in the pieces its device prefers for elementwise work."""
    return _pieces(batch, MAX_CPU_PART_ENTRIES if batch[0][1].device.type == "cpu" else MAX_BATCH_ENTRIES)


def _pieces(members: list[Member], entries: int, multiple: int = 1) -> Iterator[list[Member]]:
    size = max(1, entries // max(1, members[0][1].numel()))
    size = max(1, size // multiple * multiple)
    for start in range(0, len(members), size):
        yield members[start : start + size]


class Part:
    """Parameters of one shape as stacks (parameters, blocks, fan_out, fan_in).

    What is written back is kept only where the gradient was finite; a mask on the device chooses, so nothing waits.
    """

    def __init__(self, members: list[Member], state: Mapping[Tensor, dict[str, Tensor]], blocks: tuple[int, int, int]):
        self.indices = [index for index, _ in members]
        self.params = [p for _, p in members]
        self.states = [state[p] for p in self.params]
        self.blocks = blocks
        self.dtype = wide(self.params[0].dtype)
        # A sum is inf or nan if an entry is, and the cheapest reduction there is. It is so too if finite entries add
        # up beyond the dtype's range: such a gradient is skipped and counted as well.
        self.finite = [p.grad.sum(dtype=self.dtype).isfinite() for p in self.params if p.grad is not None]

    def __len__(self) -> int:
        return len(self.params)

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        matrices = [t.detach().reshape(self.blocks).to(self.dtype) for t in tensors]
        return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)

    def gradients(self, maximize: bool) -> Tensor:
        """The gradients of what is to be minimised."""
        G = self._stacked([p.grad for p in self.params if p.grad is not None])
        return -G if maximize else G

    def weights(self) -> Tensor:
        return self._stacked(self.params)

    def state(self) -> dict[str, Tensor]:
        return {key: self._stacked([s[key] for s in self.states]) for key in self.states[0] if key not in COUNTERS}

    def keep_state_(self, new: Mapping[str, Tensor]) -> None:
        for key, values in new.items():
            for s, value, finite in zip(self.states, values, self.finite, strict=True):
                torch.where(finite, value.reshape(s[key].shape), s[key], out=s[key])
        for s, finite in zip(self.states, self.finite, strict=True):
            s["step"].add_(finite)
            s["skipped"].add_(~finite)

    def keep_weights_(self, new: Tensor, rounding: str, seeds: list[int]) -> None:
        for p, W, finite, seed in zip(self.params, new, self.finite, seeds, strict=True):
            W = W.reshape(p.shape)
            if p.dtype == self.dtype:
                torch.where(finite, W, p, out=p)
            else:
                store_(p, torch.where(finite, W, p.to(self.dtype)), rounding, seed)
