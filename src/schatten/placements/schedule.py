"""Schedule: who computes which block of the parameters on one group of ranks, and what travels for it, bucket by bucket.

It depends on shapes, placements and rules alone, so every rank works out the same one, and the collectives of a step
never depend on which gradients there are. What a rule needs decides what travels:

| the rule's signal and retraction | to the owner | back to every holder |
|---|---|---|
| act on entries | the signal, state of the direction | the update over lr, that state |
| need whole matrices | gradient, weight, all state | weight, all state |
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from schatten.layout import Piece
from schatten.maps import Map
from schatten.placements.assignment import assign, buckets
from schatten.placements.regions import Arrangement
from schatten.placements.spread import Block, Cut, Reading, Spread, of_parameter, of_state
from schatten.rule import Rule
from schatten.state import COUNTERS, LOST, leading

# Names under which what is no state travels; no slot may call its state so.
SIGNAL, UPDATE, GRADIENT, WEIGHT = "a signal", "an update", "a gradient", "a weight"

# The share of what a step may allocate that goes to buckets on their way; the rest is for batches at their owners and for
# updates that wait to be written. `tests/distributed/test_memory.py` measures what comes of it.
TRAVEL_SHARE = 3 / 8


class Traveller(NamedTuple):
    """A parameter of a schedule: the number of its group and of itself in the optimizer, its pieces with their suffixes.

    `weights` and `averages` say how the parameter, and state of its shape, lie on the ranks; `state` has the shapes.
    """

    group: int
    number: int
    pieces: Sequence[Piece]
    suffixes: Sequence[str]
    rule: Rule
    weights: Arrangement
    averages: Arrangement
    state: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    cost: Sequence[float]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pieces[0].shape


class Move(NamedTuple):
    """A rectangle that travels: of which item, field and block, and where it is at the rank that holds it."""

    item: int
    field: str
    block: int
    cut: Cut


@dataclass(frozen=True)
class Item:
    """Equal blocks of one parameter, what travels of them there and back, and the owner of each.

    `names` says what the rule calls a state that travels.
    """

    traveller: Traveller
    piece: Piece
    suffix: str
    incoming: Mapping[str, Spread]
    outgoing: Mapping[str, Spread]
    names: Mapping[str, str]
    owners: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Items whose blocks travel together. Moves are lists by the other rank: `given` to owners and `taken` by this one,
    `returned` by this one and `kept` from owners. `shared` says that every rank sends all others the same.
    """

    items: tuple[Item, ...]
    given: list[list[Move]]
    taken: list[list[Move]]
    returned: list[list[Move]]
    kept: list[list[Move]]
    travels_in: bool
    travels_out: bool
    shared: bool


def whole_step(rule: Rule) -> bool:
    """Whether owners must take a rule's whole step, because its signal or retraction needs whole matrices."""
    return not (rule.signal.elementwise and rule.retraction.elementwise)


def schedule(travellers: Sequence[Traveller], rank: int, ranks: int, max_bytes: int) -> list[Bucket]:
    """The buckets of `travellers` as `rank` of `ranks` sees them, the last layers first, as their gradients are."""
    loads = [0.0] * ranks
    return [_bucket(_assigned(items, ranks, loads), rank, ranks) for items in in_buckets(travellers, ranks, max_bytes)]


def in_buckets(travellers: Sequence[Traveller], ranks: int, max_bytes: int) -> list[list[tuple[Item, Sequence[float]]]]:
    """The items of each bucket, without owners yet, with the cost of each block; of a step that may allocate `max_bytes`."""
    apart: dict[tuple[bool, torch.dtype], list[list[tuple[Item, Sequence[float]]]]] = defaultdict(list)
    for t in reversed(travellers):
        items = [_item(t, p) for p in range(len(t.pieces))]
        # Experts that stay would wait in one bucket with what travels.
        apart[all(_stays(item) for item, _ in items), t.dtype].append(items)
    found = []
    for (_, dtype), same in sorted(apart.items(), key=lambda one: one[0][0]):
        sized = [(own, *_bytes(own, dtype.itemsize)) for own in same]
        members = buckets(sized, ranks, int(max_bytes * TRAVEL_SHARE))
        found += [[item for own in bucket for item in own] for bucket in members]
    return found


def _stays(item: Item) -> bool:
    """Whether each block is whole on a rank and nowhere else."""
    first = next(iter(item.incoming.values()))
    return item.traveller.weights.copies == 1 and all(first.holders(b) for b in range(len(first.blocks)))


def _bytes(items: Sequence[tuple[Item, Sequence[float]]], itemsize: int) -> tuple[int, int]:
    """What a parameter takes on all ranks while it travels, and one block of it on its owner."""
    entries = block = 0
    for item, _ in items:
        copies = item.traveller.weights.copies
        for fields in (item.incoming, item.outgoing):
            for spread in fields.values():
                size = sum(len(b.rows) * len(b.columns) for b in spread.blocks)
                entries += size * (1 + spread.on.copies)
                block = max(block, size // len(spread.blocks) * (1 + copies))
    return entries * itemsize, block * itemsize


def _item(t: Traveller, p: int) -> tuple[Item, Sequence[float]]:
    piece = t.pieces[p]
    weights, averages = (spread_of(piece, on) for on in (t.weights, t.averages))
    like = torch.empty(piece.blocks, device="meta")
    if whole_step(t.rule):
        kept = [name for name in t.rule.init(like) if name not in (*COUNTERS, LOST)]
        incoming = {GRADIENT: weights, WEIGHT: weights}
        outgoing = {WEIGHT: weights}
    else:
        kept = [] if isinstance(t.rule.map, Map) else list(t.rule.map.init(like))
        incoming, outgoing = {SIGNAL: averages}, {UPDATE: weights}
    keys = {name if name in t.state else name + t.suffixes[p]: name for name in kept}
    state = {
        key: averages
        if t.state[key] == t.shape
        else of_state(t.state[key], piece.blocks[0], t.averages, leading(t.state[key], t.shape) or 0)
        for key in keys
    }
    costs = [t.cost[p]] * piece.blocks[0]
    return Item(t, piece, t.suffixes[p], {**incoming, **state}, {**outgoing, **state}, keys, ()), costs


def spread_of(piece: Piece, on: Arrangement) -> Spread:
    if not on.replicated:
        return of_parameter(piece, on)
    # Whole pieces need no parameter around them.
    n, fan_out, fan_in = piece.blocks
    blocks = tuple(Block(i, range(fan_out), range(fan_in), (fan_out, fan_in)) for i in range(n))
    return Spread(piece.blocks, Reading((0, 1, 2), 1, 1), blocks, on)


def _assigned(items: list[tuple[Item, Sequence[float]]], ranks: int, loads: list[float]) -> tuple[Item, ...]:
    costs = [cost for _, own in items for cost in own]
    allowed = []
    for item, own in items:
        first = next(iter(item.incoming.values()))
        allowed += [first.holders(b) for b in range(len(own))]
    owners = iter(assign(costs, ranks, loads, [may if len(may) < ranks else () for may in allowed]))
    return tuple(replace(item, owners=tuple(next(owners) for _ in own)) for item, own in items)


def _bucket(items: tuple[Item, ...], rank: int, ranks: int) -> Bucket:
    moves: list[list[list[Move]]] = [[[] for _ in range(ranks)] for _ in range(4)]
    given, taken, returned, kept = moves
    travels_in = travels_out = False
    shared = all(spread.on.replicated for item in items for spread in item.outgoing.values())
    for i, item in enumerate(items):
        for block, owner in enumerate(item.owners):
            for field, spread in item.incoming.items():
                sources = spread.on.same_copy(owner)
                if rank in sources and (cut := spread.cut(block, rank)):
                    given[owner].append(Move(i, field, block, cut))
                if rank == owner:
                    for source in sources:
                        if cut := spread.cut(block, source):
                            taken[source].append(Move(i, field, block, cut))
                travels_in |= len(sources) > 1 and owner not in spread.holders(block)
            for field, spread in item.outgoing.items():
                if cut := spread.cut(block, rank):
                    kept[owner].append(Move(i, field, block, cut))
                if rank == owner:
                    for holder in range(ranks):
                        if cut := spread.cut(block, holder):
                            returned[holder].append(Move(i, field, block, cut))
                travels_out |= spread.on.copies > 1 or owner not in spread.holders(block)
    return Bucket(items, given, taken, returned, kept, travels_in, travels_out and ranks > 1, shared)
