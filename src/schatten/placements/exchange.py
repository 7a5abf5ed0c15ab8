"""Exchange: flat pieces from every rank to every other in one collective, started now and waited for later."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """One all-to-all on its way: `wait()`, which may be called once, gives what each rank sent, one flat tensor for each.

    `pieces[r]` go to rank r in their order, and `sizes[r]` entries come from it. What a rank sends to itself is no part of
    the collective. `like` gives the dtype; buffers are on `device`, which must be one that the group's backend serves.
    """

    def __init__(
        self,
        pieces: Sequence[Sequence[Tensor]],
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
        rank: int,
        *,
        needed: bool,
    ) -> None:
        self.rank = rank
        self.own = _flat(pieces[rank], dtype, device)
        self.sizes = [0 if r == rank else n for r, n in enumerate(sizes)]
        self.received = torch.empty(sum(self.sizes), dtype=dtype, device=device)
        self.work: dist.Work | None = None
        if needed:
            sent = [[] if r == rank else list(p) for r, p in enumerate(pieces)]
            # Kept until the end: the collective reads it while this goes on.
            self.sent = _flat([t for p in sent for t in p], dtype, device)
            counts = [sum(t.numel() for t in p) for p in sent]
            self.work = dist.all_to_all_single(self.received, self.sent, self.sizes, counts, group=group, async_op=True)

    def arrived(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self) -> list[Tensor]:
        if self.work is not None:
            self.work.wait()
            del self.work, self.sent
        found = list(self.received.split(self.sizes))
        found[self.rank] = self.own
        del self.received, self.own
        return found


class Gathering:
    """As `Exchange`, where every rank sends all of the others the same pieces: an all-gather of equal, padded shares."""

    def __init__(
        self,
        pieces: Sequence[Tensor],
        sizes: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.sizes, self.share = sizes, max(sizes)
        own = _flat(pieces, dtype, device)
        self.sent = torch.nn.functional.pad(own, (0, self.share - len(own)))
        self.received = torch.empty(self.share * len(sizes), dtype=dtype, device=device)
        # Its name since torch 2.12; the older one warns.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self.work = gather(self.received, self.sent, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        assert self.work is not None
        self.work.wait()
        del self.work, self.sent
        return [share[:n] for share, n in zip(self.received.view(-1, self.share), self.sizes, strict=True)]


def _flat(pieces: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not pieces:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.cat([t.reshape(-1).to(device, dtype) for t in pieces])
