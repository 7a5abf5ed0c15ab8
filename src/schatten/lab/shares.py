"""Shares: what the matrices that go one way (`schatten.placements.ways`) cost on every rank, in vectors and seconds."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schatten.batching import BYTES_PER_ENTRY, in_batches
from schatten.lab.traffic import ITEM, Traffic, entry_bytes, local, of_owner, traffic, zeros
from schatten.placements import gram
from schatten.placements.cost import work
from schatten.placements.machine import Machine
from schatten.placements.schedule import Traveller, in_buckets

DIRECTIONS, ENTRIES, WAITING = "directions", "work on entries", "waiting for other ranks"
SENT, LATENCY = "bytes sent", "latency of collectives"
NAMES = (DIRECTIONS, ENTRIES, WAITING, SENT, LATENCY)


class Setting(NamedTuple):
    """A machine, how many of it, where products are computed and in which precision, and what a step may allocate."""

    machine: Machine
    ranks: int
    device: torch.device
    dtype: str
    max_bytes: int


class Share(NamedTuple):
    """Seconds by name, of which `hidden` are behind others; on each rank the arithmetic, bytes sent and pieces of matrices that
    Python handles; bytes allocated at most.
    """

    seconds: dict[str, float]
    flops: Tensor
    sent: Tensor
    handled: Tensor
    hidden: float = 0.0
    matrices: int = 0
    collectives: int = 0
    buckets: int = 0
    peak: float = 0.0


def by_owners(travellers: Sequence[Traveller], setting: Setting) -> Share:
    """Blocks travel to their owners and back, in the buckets of the placements."""
    machine, ranks = setting.machine, setting.ranks
    seen = buckets_of(travellers, ranks, setting.max_bytes, setting.dtype)
    ways = [(bucket.there, bucket.back) for bucket in seen]
    wire = [tuple(machine.collective(ITEM * way, ranks) if way else 0.0 for way in pair) for pair in ways]
    collectives = sum(way > 0 for pair in ways for way in pair)
    latency = collectives * machine.collective(0.0, ranks)
    directions = [bucket.directions(machine, setting.dtype) for bucket in seen]
    entries = [bucket.on_entries(machine) for bucket in seen]
    computing = _sum(directions, ranks)
    busy = computing + _sum([part for parts in entries for part in parts], ranks)
    busiest = int(busy.argmax())
    alone, elapsed = (_elapsed(directions, entries, times, ranks) for times in ([(0.0, 0.0)] * len(seen), wire))
    travelling = sum(map(sum, wire))
    seconds = {
        DIRECTIONS: float(computing[busiest]),
        ENTRIES: float(busy[busiest] - computing[busiest]),
        WAITING: max(0.0, alone - float(busy[busiest])),
        SENT: travelling - latency,
        LATENCY: latency,
    }
    return Share(
        seconds,
        _sum([bucket.flops for bucket in seen], ranks),
        ITEM * _sum([bucket.sent for bucket in seen], ranks),
        _sum([vector for bucket in seen for vector in bucket.pieces], ranks),
        hidden=max(0.0, alone + travelling - elapsed),
        matrices=sum(sum(shapes.values()) for bucket in seen for shapes in bucket.owned),
        collectives=collectives,
        buckets=len(seen),
        peak=_peak(seen, setting),
    )


def buckets_of(travellers: Sequence[Traveller], ranks: int, max_bytes: int, dtype: str) -> list[Traffic]:
    """The buckets of `schatten.placements.schedule.schedule`, each for all ranks."""
    loads = [0.0] * ranks
    return [traffic(items, ranks, loads, dtype) for items in in_buckets(travellers, ranks, max_bytes)]


def _elapsed(
    directions: Sequence[Tensor],
    entries: Sequence[tuple[Tensor, Tensor, Tensor]],
    wire: Sequence[tuple[float, ...]],
    ranks: int,
) -> float:
    """Seconds until the last rank is done, as `schatten.placements.team` goes through buckets: one is sent while the one
    before it is computed and the one before that comes back. Collectives start when all ranks have come to them, in order.
    """
    clock, free, count = zeros(ranks), 0.0, len(wire)
    arrived, returned = [0.0] * count, [0.0] * count
    for k in range(count + 2):
        if k < count:
            clock = clock + entries[k][0]
            arrived[k] = free = max(float(clock.max()), free) + wire[k][0]
        if 0 <= (j := k - 1) < count:
            clock = clock.clamp(min=arrived[j]) + directions[j] + entries[j][1]
            returned[j] = free = max(float(clock.max()), free) + wire[j][1]
        if 0 <= (j := k - 2) < count:
            clock = clock.clamp(min=returned[j]) + entries[j][2]
    return float(clock.max())


def _peak(seen: Sequence[Traffic], setting: Setting) -> float:
    """The most that is allocated at a time: one bucket is computed while the next arrives and the last comes back."""
    peak, max_batch = 0.0, setting.max_bytes // 2
    for before, now, after in zip([None, *seen[:-1]], seen, [*seen[1:], None], strict=True):
        batch = torch.tensor([_batch(shapes, setting, max_batch) for shapes in now.owned], dtype=torch.float64)
        entries = 2 * now.taken + now.returned + now.kept
        entries = entries + (0 if before is None else before.returned + before.kept)
        entries = entries + (0 if after is None else after.given + after.taken)
        peak = max(peak, float((ITEM * entries + batch).max()))
    return peak


def _batch(shapes: Counter[tuple[int, int]], setting: Setting, max_batch: int) -> int:
    """Bytes while the largest batch is computed: one matrix at least, and no more than there are."""
    sizes = [(a * b, n) for (a, b), n in shapes.items()]
    return max((_entry_bytes(setting) * max(one, min(max_batch // BYTES_PER_ENTRY, n * one)) for one, n in sizes), default=0)


def _entry_bytes(setting: Setting) -> int:
    """What a batch takes for an entry, see `BYTES_PER_ENTRY`."""
    return BYTES_PER_ENTRY // (1 if setting.dtype in ("float32", "float64") else 2)


def together(travellers: Sequence[Traveller], setting: Setting) -> Share:
    """Matrices that stay where they are, ranks adding up their products."""
    machine, ranks = setting.machine, setting.ranks
    directions = travelling = flops = sent = 0.0
    matrices = collectives = peak = 0
    for (shape, K), count in _alike(travellers).items():
        each = gram.work(K, min(shape), max(shape), ranks, setting.dtype)
        entries = math.prod(shape) // ranks
        for batch in _batches(count, entries, setting.device, setting.max_bytes // 2):
            directions += machine.seconds(each.operations, batch)
            travelling += each.collectives * machine.collective(batch * each.sent / max(1, each.collectives), ranks)
            collectives += each.collectives
            peak = max(peak, batch * entries * _entry_bytes(setting))
        flops, sent, matrices = flops + count * each.flops, sent + count * each.sent, matrices + count
    latency = collectives * machine.collective(0.0, ranks)
    seconds = {
        DIRECTIONS: directions,
        ENTRIES: _on_entries(travellers, setting, copies=2),
        SENT: travelling - latency,
        LATENCY: latency,
    }
    # A part of each block goes into a batch and out of it.
    flops_of, sent_by, handled = (_all(value, ranks) for value in (flops, sent, 2 * matrices))
    return Share(seconds, flops_of, sent_by, handled, matrices=matrices, collectives=collectives, peak=peak)


def here(travellers: Sequence[Traveller], setting: Setting, *, entries: bool) -> Share:
    """What each rank steps by itself: the entries it has, by a rule on `entries`, or whole matrices."""
    directions = flops = 0.0
    counts: Counter[tuple[int, int]] = Counter()
    for (shape, _), count in _alike(travellers).items():
        rule = travellers[0].rule
        counts[shape] += count
        flops += count * work(rule, *shape, setting.dtype).flops
        if not entries:
            operations = of_owner(rule, shape, setting.dtype)
            batches = _batches(count, math.prod(shape), setting.device, setting.max_bytes)
            directions += sum(setting.machine.seconds(operations, batch) for batch in batches)
    seconds = {DIRECTIONS: directions, ENTRIES: _on_entries(travellers, setting, directions=entries)}
    peak = 0 if entries else _batch(counts, setting, setting.max_bytes)
    nothing = zeros(setting.ranks)
    return Share(seconds, _all(flops, setting.ranks), nothing, nothing, matrices=counts.total(), peak=peak)


def _alike(travellers: Sequence[Traveller]) -> dict[tuple[tuple[int, int], Any], int]:
    """How many blocks there are of each shape and map."""
    found: dict[tuple[tuple[int, int], Any], int] = defaultdict(int)
    for t in travellers:
        for piece in t.pieces:
            found[(piece.blocks[1], piece.blocks[2]), t.rule.map] += piece.blocks[0]
    return found


def _batches(count: int, entries: int, device: torch.device, max_bytes: int) -> list[int]:
    """How many of `count` blocks are computed at a time."""
    return [len(batch) for batch in in_batches(list(range(count)), entries, 1.0, torch.float32, device, max_bytes)]


def _on_entries(travellers: Sequence[Traveller], setting: Setting, *, copies: int = 0, directions: bool = False) -> float:
    """Seconds of signals and retractions, of `directions` that are work on entries, and of copies of all of it."""
    touched, kinds = zeros(setting.ranks), {}
    for t in travellers:
        shape = t.pieces[0].blocks[1], t.pieces[0].blocks[2]
        counted = work(t.rule, *shape, setting.dtype)
        signal, retraction = entry_bytes(t, shape, setting.dtype)
        direction = sum(op.bytes for op in counted.direction) / math.prod(shape) if directions else 0.0
        touched += local(t.averages, t.shape) * signal
        touched += local(t.weights, t.shape) * (retraction + direction + 2 * ITEM * copies)
        kinds[t.shape] = len(counted.signal) + len(counted.retraction)
    return float(touched.max()) / setting.machine.memory_bandwidth + setting.machine.launch * sum(kinds.values())


def _all(value: float, ranks: int) -> Tensor:
    return torch.full((ranks,), value, dtype=torch.float64)


def _sum(vectors: Sequence[Tensor], ranks: int) -> Tensor:
    return sum(vectors, zeros(ranks))
