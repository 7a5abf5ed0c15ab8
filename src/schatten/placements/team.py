"""Team: the ranks of one process group that step their common parameters together.

For each bucket: signals of this rank's part, what owners need to them, whole matrices at their owners, what holders need
back, and their weights. While a bucket is computed the next one's pieces are on their way.
"""

import zlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from schatten.placements.flight import Context, Flight, Wire
from schatten.placements.local import Local
from schatten.placements.schedule import Traveller, schedule


class Team:
    """The schedule of `travellers` on the ranks of `group`, and the step that follows it.

    `device` is where blocks are computed and travel. `max_bytes` bounds what a step allocates beside state and gradients.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, travellers: Sequence[Traveller], device: torch.device, max_bytes: int
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.wire = Wire(group, rank, size, device, max_bytes)
        self.buckets = schedule(travellers, rank, size, max_bytes)

    def fingerprint(self) -> int:
        """Of what every rank must have alike."""
        owners = [[(i.traveller.number, i.suffix, i.piece.blocks, i.owners) for i in b.items] for b in self.buckets]
        return zlib.crc32(repr(owners).encode())

    def step_(self, moving: Mapping[int, Local], context: Context) -> None:
        """One step of the parameters in `moving`, which must be the same on every rank."""
        started: Flight | None = None
        computed: Flight | None = None
        # Every rank comes by here in one order, or their collectives would not meet.
        for bucket in [*self.buckets, None, None]:
            fresh = Flight(self.wire, bucket, moving, context) if bucket is not None else None
            if fresh is not None:
                fresh.start()
            if started is not None:
                started.compute()
            if computed is not None:
                computed.finish()
            started, computed = fresh, started
