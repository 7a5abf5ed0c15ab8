"""Agreement: what the hosts of all ranks must know alike before any of them changes a weight, by one all-reduce.

Collectives of a step are the same on every rank whatever gradients there are. But whether a parameter moves, and whether
some rank has refused the step, is decided by all together: a rank that raised alone would leave the others waiting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Verdict(NamedTuple):
    """Of each parameter: whether some rank has a gradient, whether some rank has none, whether one is known to be not
    finite. `failed` is a rank that refuses the step, None for none; `different` says whether ranks have other numbers."""

    present: list[bool]
    absent: list[bool]
    bad: list[bool]
    failed: int | None
    different: bool


def agree(
    present: Sequence[bool],
    bad: Sequence[bool],
    group: dist.ProcessGroup | None,
    rank: int,
    *,
    failed: bool,
    fingerprint: int,
) -> Verdict:
    """One all-reduce, on the host, of what this rank has of each parameter, of its refusal and of a `fingerprint` < 2^62."""
    n = len(present)
    own = [*present, *(not p for p in present), *bad, (rank + 1) * failed, fingerprint, -fingerprint]
    flags = torch.tensor([int(x) for x in own], dtype=torch.int64)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    # On the host from the start: nothing waits for a device.
    *found, who, high, low = flags.tolist()
    seen = [bool(x) for x in found]
    return Verdict(seen[:n], seen[n : 2 * n], seen[2 * n :], who - 1 if who else None, high != -low)


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group` if it serves tensors of the host, otherwise a gloo group of the same ranks, which they must all ask for."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    return new_group(dist.get_process_group_ranks(group), backend="gloo")


def new_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup:
    """A group of these ranks, each of which must ask for it; no other rank has to."""
    group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(f"torch.distributed made no group of the ranks {list(ranks)}, to which this one belongs.")
    return group
