"""Traffic: what every rank computes, sends and copies for the blocks of one bucket, as vectors over ranks.

The engine's schedule lists each rank's own moves; this adds up those of all ranks at once, for meshes of thousands.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from schatten.placements.assignment import assign
from schatten.placements.cost import work
from schatten.placements.machine import Machine, Operation
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import Item, Traveller, spread_of, whole_step
from schatten.placements.spread import Spread
from schatten.rule import Rule

# Bytes of an entry: fp32 travels, and is what weights and state are kept in.
ITEM = 4


@dataclass(frozen=True)
class Traffic:
    """Vectors over ranks. In entries: pieces as they leave, arrive at owners, leave them and arrive; `home` are those of them
    that stay on their rank, there and back. `pieces` counts those that leave and those that arrive, there and back. `touched`
    are bytes of signals and retractions, `launches` their kernels. `owned` has the number of matrices of each shape.
    """

    given: Tensor
    taken: Tensor
    returned: Tensor
    kept: Tensor
    home: tuple[Tensor, Tensor]
    pieces: tuple[Tensor, Tensor, Tensor, Tensor]
    touched: tuple[Tensor, Tensor]
    launches: tuple[int, int]
    flops: Tensor
    owned: list[Counter[tuple[int, int]]]
    shared: bool
    rule: Rule

    @property
    def sent(self) -> Tensor:
        back = self.returned - self.home[1]
        return self.given - self.home[0] + (torch.full_like(back, float(back.max())) if self.shared else back)

    @property
    def there(self) -> float:
        """The entries that the first collective waits for."""
        return float((torch.maximum(self.given, self.taken) - self.home[0]).max())

    @property
    def back(self) -> float:
        """And the second."""
        return float((torch.maximum(self.returned, self.kept) - self.home[1]).max())

    def directions(self, machine: Machine, dtype: str) -> Tensor:
        """Seconds of each rank's own matrices."""
        kinds = {shape: of_owner(self.rule, shape, dtype) for shapes in self.owned for shape in shapes}
        seconds = [sum(machine.seconds(kinds[shape], n) for shape, n in shapes.items()) for shapes in self.owned]
        return torch.tensor(seconds, dtype=torch.float64)

    def on_entries(self, machine: Machine) -> tuple[Tensor, Tensor, Tensor]:
        """Seconds of signals, of what is copied at owners and of retractions: out of buffers, into them and into stacks."""

        def seconds(size: Tensor, launches: Tensor | float) -> Tensor:
            return size / machine.memory_bandwidth + machine.launch * launches

        copy = 2 * ITEM
        return (
            seconds(self.touched[0] + copy * self.given, self.launches[0]),
            seconds(copy * (2 * self.taken + self.returned), self.pieces[1]),
            seconds(self.touched[1] + copy * 2 * self.kept, self.pieces[3] + self.launches[1]),
        )


def traffic(items: Sequence[tuple[Item, Sequence[float]]], ranks: int, loads: list[float], dtype: str) -> Traffic:
    """What every rank does for blocks that travel together; `loads` is brought up to date."""
    given, taken, returned, kept, home_in, home_out, signals, retractions, flops = (zeros(ranks) for _ in range(9))
    pieces = cut, arrived, handed, received = zeros(ranks), zeros(ranks), zeros(ranks), zeros(ranks)
    owned: list[Counter[tuple[int, int]]] = [Counter() for _ in range(ranks)]
    kinds: dict[tuple[int, ...], tuple[int, int]] = {}
    for (item, _), own in zip(items, _owners(items, ranks, loads), strict=True):
        t, owners = item.traveller, torch.tensor(own)
        shape = item.piece.blocks[1], item.piece.blocks[2]
        counted = work(t.rule, *shape, dtype)
        for owner in own:
            owned[owner][shape] += 1
        flops.index_add_(0, owners, torch.full((len(own),), counted.flops, dtype=torch.float64))
        for spread in item.incoming.values():
            copy = _copies(spread.on)
            sent = held(spread) * (copy == copy[owners].unsqueeze(-1))
            given += sent.sum(0)
            taken.index_add_(0, owners, sent.sum(1))
            cut += (sent > 0).sum(0)
            arrived.index_add_(0, owners, (sent > 0).sum(1).double())
            home_in.index_add_(0, owners, sent.gather(1, owners.unsqueeze(-1)).squeeze(-1))
        for spread in item.outgoing.values():
            back = held(spread)
            returned.index_add_(0, owners, back.sum(1))
            kept += back.sum(0)
            handed.index_add_(0, owners, (back > 0).sum(1).double())
            received += (back > 0).sum(0)
            home_out.index_add_(0, owners, back.gather(1, owners.unsqueeze(-1)).squeeze(-1))
        if not whole_step(t.rule):
            signal, retraction = entry_bytes(t, shape, dtype)
            signals += held(spread_of(item.piece, t.averages)).sum(0) * signal
            retractions += held(spread_of(item.piece, t.weights)).sum(0) * retraction
            kinds[local_shape(t.weights, t.shape)] = len(counted.signal), len(counted.retraction)
    return Traffic(
        given,
        taken,
        returned,
        kept,
        home=(home_in, home_out),
        pieces=pieces,
        touched=(signals, retractions),
        launches=(sum(n for n, _ in kinds.values()), sum(n for _, n in kinds.values())),
        flops=flops,
        owned=owned,
        shared=all(spread.on.replicated for item, _ in items for spread in item.outgoing.values()),
        rule=items[0][0].traveller.rule,
    )


def _owners(items: Sequence[tuple[Item, Sequence[float]]], ranks: int, loads: list[float]) -> list[list[int]]:
    costs = [cost for _, own in items for cost in own]
    allowed: list[Sequence[int]] = []
    for item, _ in items:
        allowed += _holders(next(iter(item.incoming.values())))
    found = iter(assign(costs, ranks, loads, [may if len(may) < ranks else () for may in allowed]))
    return [[next(found) for _ in own] for _, own in items]


def of_owner(rule: Rule, shape: tuple[int, int], dtype: str) -> tuple[Operation, ...]:
    """What is computed of a whole matrix, the rest being work on entries."""
    counted = work(rule, *shape, dtype)
    return counted.operations if whole_step(rule) else counted.direction


def entry_bytes(t: Traveller, shape: tuple[int, int], dtype: str) -> tuple[float, float]:
    """Bytes for an entry that signal and retraction read and write, what is stacked for them and written back included: the
    gradient, looked at once before, state in and out; the weight in and out.
    """
    counted = work(t.rule, *shape, dtype)
    signal, retraction = (sum(op.bytes for op in slot) / math.prod(shape) for slot in (counted.signal, counted.retraction))
    averages = sum(state == t.shape for state in t.state.values())
    return signal + ITEM + 2 * ITEM * (1 + 2 * averages), retraction + 2 * ITEM * 2


@lru_cache(maxsize=1024)
def held(spread: Spread) -> Tensor:
    """Entries (blocks, ranks) of each block on each rank."""
    cuts = [[spread.cut(b, rank) for rank in range(spread.on.size)] for b in range(len(spread.blocks))]
    return torch.tensor([[0 if cut is None else cut.entries for cut in row] for row in cuts], dtype=torch.float64)


@lru_cache(maxsize=1024)
def _holders(spread: Spread) -> list[list[int]]:
    """The ranks that hold all of a block, for each block."""
    sizes = torch.tensor([len(block.rows) * len(block.columns) for block in spread.blocks], dtype=torch.float64)
    return [row.nonzero().flatten().tolist() for row in held(spread) == sizes.unsqueeze(-1)]


@lru_cache(maxsize=64)
def _copies(on: Arrangement) -> Tensor:
    """Which copy of the tensor each rank holds a part of."""
    numbers: dict[tuple[int, ...], int] = {}
    return torch.tensor([numbers.setdefault(on.copy_of(rank), len(numbers)) for rank in range(on.size)])


@lru_cache(maxsize=1024)
def local(on: Arrangement, shape: tuple[int, ...]) -> Tensor:
    """Entries on each rank."""
    return torch.tensor([math.prod(local_shape(on, shape, rank)) for rank in range(on.size)], dtype=torch.float64)


def local_shape(on: Arrangement, shape: tuple[int, ...], rank: int = 0) -> tuple[int, ...]:
    return tuple(len(along) for along in on.held(shape, rank))


def zeros(ranks: int) -> Tensor:
    return torch.zeros(ranks, dtype=torch.float64)
