"""Regions: which entries of a tensor each rank of a process group holds.

A region is a product of index vectors, one for each dimension, as every DTensor placement cuts along dimensions. Ranks
are counted within their group; a group's mesh gives each a coordinate, and those whose coordinates differ only where a
placement replicates hold the same region.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

# Increasing; a range where they follow each other, as they nearly always do.
Indices = range | tuple[int, ...]


def joined(pieces: Iterable[Sequence[int]]) -> Indices:
    """Increasing indices one after the other, as a range if they are one.

    Example:
        >>> from schatten.placements.regions import joined
        >>> joined([range(2), range(2, 4)]), joined([range(2), range(3, 4)])
        (range(0, 4), (0, 1, 3))
    """
    kept = [piece for piece in pieces if len(piece)]
    if not kept:
        return range(0)
    if all(isinstance(piece, range) and piece.step == 1 for piece in kept) and all(
        a[-1] + 1 == b[0] for a, b in itertools.pairwise(kept)
    ):
        return range(kept[0][0], kept[-1][-1] + 1)
    found = tuple(i for piece in kept for i in piece)
    return range(found[0], found[-1] + 1) if found[-1] - found[0] + 1 == len(found) else found


@dataclass(frozen=True)
class Arrangement:
    """Ranks 0 to N - 1 of a group laid out as `mesh`, with a tensor placed on each of its dimensions by `placements`.

    `order` gives the rank of the group at each place of the mesh, in row-major order.

    Example:
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> from schatten.placements.regions import Arrangement
        >>> on = Arrangement((2, 2), (Replicate(), Shard(0)))
        >>> on.held((3, 4), rank=1), on.same_copy(rank=2)
        ((range(2, 3), range(0, 4)), (2, 3))
    """

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]
    order: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.order:
            object.__setattr__(self, "order", tuple(range(math.prod(self.mesh))))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.order)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds everything."""
        return all(p.is_replicate() for p in self.placements)

    @property
    def copies(self) -> int:
        """How many ranks hold each entry."""
        return math.prod(n for n, p in zip(self.mesh, self.placements, strict=True) if p.is_replicate())

    def coordinate(self, rank: int) -> tuple[int, ...]:
        return _coordinates(self.mesh, self.order)[rank]

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """Which of the copies a rank's entries belong to: its coordinates where the tensor is replicated."""
        return tuple(c for c, p in zip(self.coordinate(rank), self.placements, strict=True) if p.is_replicate())

    def same_copy(self, rank: int) -> tuple[int, ...]:
        """The ranks whose regions, each different, make up the tensor, that of `rank` among them."""
        return _same_copy(self, rank)

    def held(self, shape: Sequence[int], rank: int) -> tuple[Indices, ...]:
        """The indices along each dimension of a tensor of `shape` whose entries `rank` holds."""
        return _held(self, tuple(shape), rank)

    def cut_along(self, dim: int) -> "Arrangement":
        """The same ranks, with whatever is sharded sharded along `dim`."""
        return Arrangement(self.mesh, tuple(p if p.is_replicate() else Shard(dim) for p in self.placements), self.order)

    def alike(self) -> "Arrangement":
        """The same ranks, each of which holds everything."""
        return Arrangement(self.mesh, tuple(Replicate() for _ in self.mesh), self.order)


@lru_cache(maxsize=256)
def _coordinates(mesh: tuple[int, ...], order: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return dict(zip(order, itertools.product(*map(range, mesh)), strict=True))


@lru_cache(maxsize=4096)
def _same_copy(on: Arrangement, rank: int) -> tuple[int, ...]:
    own = on.copy_of(rank)
    return tuple(sorted(r for r in on.order if on.copy_of(r) == own))


@lru_cache(maxsize=65536)
def _held(on: Arrangement, shape: tuple[int, ...], rank: int) -> tuple[Indices, ...]:
    indices: list[Indices] = [range(n) for n in shape]
    for count, placement, own in zip(on.mesh, on.placements, on.coordinate(rank), strict=True):
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        # FSDP2 over tensor parallel: cut first into what the later mesh dimension will take, then each of these.
        pieces = _chunks(indices[dim], getattr(placement, "split_factor", 1))
        indices[dim] = joined(_chunks(piece, count)[own] for piece in pieces)
    return tuple(indices)


def _chunks(along: Indices, count: int) -> list[Indices]:
    """As torch.chunk cuts, with empty pieces where it returns fewer."""
    size = -(-len(along) // count)
    return [along[k * size : (k + 1) * size] for k in range(count)]


def arrangement(p: DTensor) -> Arrangement:
    """How a DTensor lies on the ranks of its mesh, counted as their process group counts them.

    Raises ValueError for a placement that is neither Replicate nor Shard.
    """
    mesh = p.device_mesh
    for placement in p.placements:
        if not (placement.is_replicate() or hasattr(placement, "dim")) or placement.is_partial():
            raise ValueError(
                f"A parameter must be sharded or replicated over each mesh dimension, got {placement!r} for shape "
                f"{tuple(p.shape)}: redistribute it before it is given to an optimizer."
            )
    ranks = mesh.mesh.flatten().tolist()
    place = {rank: i for i, rank in enumerate(sorted(ranks))}
    return Arrangement(tuple(mesh.shape), tuple(p.placements), tuple(place[r] for r in ranks))


def everywhere(ranks: int) -> Arrangement:
    """Every one of `ranks` holds everything, as under DistributedDataParallel."""
    return Arrangement((ranks,), (Replicate(),))
