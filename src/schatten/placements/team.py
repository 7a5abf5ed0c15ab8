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
from schatten.placements.slab import Slab, slabs
from schatten.solvers.core import working_dtype


class Team:
    """The schedule of `travellers` on the ranks of `group`, and the step that follows it; the matrices of `spread` stay where
    they are and are computed by all ranks together (`schatten.placements.slab`).

    `device` is where blocks are computed and travel. `max_bytes` bounds what a step allocates beside state and gradients.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        travellers: Sequence[Traveller],
        spread: Sequence[Traveller],
        device: torch.device,
        max_bytes: int,
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self.wire = Wire(group, group, rank, size, device, max_bytes // 2)
        self.buckets = schedule(travellers, rank, size, max_bytes)
        self.slabs = slabs(spread, size, device, max_bytes // 2)
        self.may_wait = max_bytes // 8

    def fingerprint(self) -> int:
        """Of what every rank must have alike."""
        owners = [[(i.traveller.number, i.suffix, i.piece.blocks, i.owners) for i in b.items] for b in self.buckets]
        together = [[(t.number, p, b) for t, p, b in batch] for slab in self.slabs for batch in slab]
        # Processors that multiply in different precisions would run different iterations, with other sums on the way.
        precision = working_dtype(torch.empty(0, device=self.wire.device), "auto")
        return zlib.crc32(repr((owners, together, precision)).encode())

    def arrive(self, moving: Mapping[int, Local], context: Context) -> list["Flight | Slab"]:
        """Compute a step of the parameters in `moving`, which must be the same on every rank, and what is left to write.

        Nothing is written before all of it has arrived, so that a rank that dies leaves the others' weights as they were,
        unless they take more than an eighth of `max_bytes`: then each bucket is written when the next one has been computed.
        """
        held = sum(local.p.numel() * local.traveller.dtype.itemsize for local in moving.values())
        waiting: list[Flight | Slab] = []
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
                computed.arrive()
                waiting.append(computed)
                if held > self.may_wait:
                    waiting.pop().write_()
            started, computed = fresh, started
        return [*waiting, *self.together(moving, context)]

    def together(self, moving: Mapping[int, Local], context: Context) -> list[Slab]:
        """The part of the step that all ranks compute together, and what is left to write."""
        found = [Slab(self.wire, slab, moving, context) for slab in self.slabs]
        for slab in found:
            slab.compute()
        return found
