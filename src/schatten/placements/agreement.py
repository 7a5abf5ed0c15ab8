"""Agreement: what the hosts of all ranks must know alike before any of them changes a weight, by one all-reduce.

Collectives of a step are the same on every rank whatever gradients there are. But whether a parameter moves, and whether
some rank has refused the step, is decided by all together: a rank that raised alone would leave the others waiting.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


class Verdict(NamedTuple):
    """Of each parameter: whether some rank has a gradient, whether some rank has none, whether one is known to be not
    finite, whether one is placed otherwise than the parameter. `failed` is a rank that refuses the step, None for none;
    `different` says whether ranks have other numbers; `ahead` has the most that any has done of the step already.
    """

    present: list[bool]
    absent: list[bool]
    bad: list[bool]
    elsewhere: list[bool]
    failed: int | None
    different: bool
    ahead: tuple[int, int]


def agree(
    present: Sequence[bool],
    bad: Sequence[bool],
    elsewhere: Sequence[bool],
    group: dist.ProcessGroup | None,
    rank: int,
    *,
    failed: bool,
    fingerprint: int,
    ahead: tuple[int, int] = (0, 0),
) -> Verdict:
    """One all-reduce, on the host, of what this rank has of each parameter, of its refusal, of a `fingerprint` < 2^62, and of
    how many buckets it has sent to their owners and computed `ahead` of the step.
    """
    n = len(present)
    own = [*present, *(not p for p in present), *bad, *elsewhere, *ahead, (rank + 1) * failed, fingerprint, -fingerprint]
    flags = torch.tensor([int(x) for x in own], dtype=torch.int64)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    # On the host from the start: nothing waits for a device.
    *found, sent, computed, who, high, low = flags.tolist()
    seen = [bool(x) for x in found]
    others = (who - 1 if who else None, high != -low, (sent, computed))
    return Verdict(seen[:n], seen[n : 2 * n], seen[2 * n : 3 * n], seen[3 * n :], *others)


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """`group` if it is gloo's alone, otherwise a gloo group of the same ranks, which they must all ask for.

    The host's part of a mixed group is left to others, such as a checkpoint that is saved in the background.
    """
    backends = str(dist.get_backend_config(group)).split(",")
    if "cpu" in str(backends) and all(backend.endswith("gloo") for backend in backends):
        return group
    return new_group(dist.get_process_group_ranks(group), "gloo", patience(group))


def group_like(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Another group of the same ranks, backends and patience, which they must all ask for."""
    return new_group(dist.get_process_group_ranks(group), str(dist.get_backend_config(group)), patience(group, device))


def patience(group: dist.ProcessGroup, device: torch.device | None = None) -> timedelta:
    """How long a rank of `group` waits for another, by the backend of `device`, or of any.

    Torch has no public way to ask for it, and the default of a new group is half an hour.
    """
    return group._get_backend(device or group._device_types[0]).options._timeout


def new_group(ranks: Sequence[int], backend: str | None, timeout: timedelta) -> dist.ProcessGroup:
    """A group of these ranks, each of which must ask for it; no other rank has to."""
    group = dist.new_group(list(ranks), timeout, backend, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(f"torch.distributed made no group of the ranks {list(ranks)}, to which this one belongs.")
    return group
