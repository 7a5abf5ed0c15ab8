"""Slab: matrices whose longer side is cut over the ranks, computed by all of them together where they lie.

Each product X X^T over the longer side is a sum over ranks (`schatten.placements.gram`); nothing else travels.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from schatten.batching import Part, Room, batches, in_batches
from schatten.maps import Map, Nuclear
from schatten.placements import gram
from schatten.placements.flight import Context, Wire
from schatten.placements.local import Local, signal_members, weight_members
from schatten.placements.schedule import Traveller, whole_step
from schatten.placements.spread import of_parameter
from schatten.retractions.core import lr_of
from schatten.scales import Scale
from schatten.stepping import retract_, signals_

# Parameter, piece and block.
Place = tuple[Traveller, int, int]


def side(t: Traveller, ranks: int) -> int | None:
    """The side along which all blocks of a parameter are cut over all ranks, -2 or -1, if ranks can compute its direction
    together; None if not.
    """
    if whole_step(t.rule) or not isinstance(t.rule.map, Map) or not isinstance(t.rule.scale, Scale) or t.weights.copies > 1:
        return None
    for dim in (-2, -1):
        fits = all(
            gram.supports(t.rule, *piece.blocks[1:], dim)
            and all(_whole_across(of_parameter(piece, t.weights), b, dim, ranks) for b in range(piece.blocks[0]))
            for piece in t.pieces
        )
        if fits:
            return dim
    return None


def _whole_across(spread: Any, block: int, dim: int, ranks: int) -> bool:
    """Whether each rank that holds something of a block holds all of its other side."""
    across = 1 if dim == -2 else 0
    cuts = [spread.cut(block, rank) for rank in range(ranks)]
    return all(cut is None or len(cut.there[across]) == spread.blocks[block].shape[across] for cut in cuts)


def slabs(travellers: Sequence[Traveller], ranks: int, device: torch.device, max_bytes: int) -> list[list[list[Place]]]:
    """For each param group the equal blocks, cut along one side, that are computed together."""
    alike: dict[int, dict[Any, list[Place]]] = defaultdict(lambda: defaultdict(list))
    for t in travellers:
        dim = side(t, ranks)
        for p, piece in enumerate(t.pieces):
            alike[t.group][piece.blocks[1:], dim, t.dtype] += [(t, p, b) for b in range(piece.blocks[0])]
    found = []
    for own in alike.values():
        found.append([])
        for ((fan_out, fan_in), _, dtype), same in own.items():
            found[-1] += in_batches(same, fan_out * fan_in // ranks, 1.0, dtype, device, max_bytes)
    return found


class Slab:
    """Such blocks of one param group in one step."""

    def __init__(self, wire: Wire, batches: Sequence[Sequence[Place]], moving: Mapping[int, Local], context: Context) -> None:
        self.wire, self.context = wire, context
        # Decided alike on all ranks, so their sums have the same terms.
        moved = ([place for place in batch if place[0].number in moving] for batch in batches)
        self.batches = [batch for batch in moved if batch]
        self.locals = list({t.number: moving[t.number] for batch in self.batches for t, _, _ in batch}.values())
        self.stacks: dict[int, Tensor] = {}

    def compute(self) -> None:
        """Directions of this rank's parts."""
        if self.locals:
            signals = self._signals()
            for batch in self.batches:
                self._compute(batch, signals)

    def _compute(self, places: Sequence[Place], signals: Mapping[int, Tensor]) -> None:
        t, first, _ = places[0]
        group, rule, wire = self.context.groups[t.group], self.context.rules[t.group], self.wire
        dim, shape = side(t, wire.size), t.pieces[first].blocks[1:]
        assert dim is not None and isinstance(rule.map, Map)
        parts, cuts = [], []
        for traveller, p, b in places:
            cut = of_parameter(traveller.pieces[p], traveller.weights).cut(b, wire.rank)
            cuts.append(cut)
            nothing = torch.empty([0 if at == dim + 2 else n for at, n in enumerate(shape)])
            parts.append(nothing if cut is None else cut.of_stack(signals[traveller.number]))
        D = gram.direction(rule.map, _padded(parts, dim, t.dtype, wire.device), dim, shape[dim], wire.group)
        if self.context.recorder is not None and isinstance(rule.map, Nuclear):
            products = D.mT @ D if dim == -2 else D @ D.mT
            dist.all_reduce(products, group=wire.group)
            self.context.recorder.grams([(traveller.number, traveller.suffixes[p]) for traveller, p, _ in places], products)
        D *= rule.scale.factor(*shape)
        if self.context.recorder is not None:
            self.context.recorder.update([t.number for t, _, _ in places], D * lr_of(group))
        for (traveller, _, _), cut, part, update in zip(places, cuts, parts, D, strict=True):
            if cut is not None:
                signal = signals[traveller.number]
                into = self.stacks.setdefault(traveller.number, torch.empty_like(signal))
                cut.into_stack_(into, update.narrow(dim, 0, part.shape[dim]).reshape(-1).to(into.device))

    def _signals(self) -> dict[int, Tensor]:
        """Signals of this rank's shards, by parameter, as their layouts read them."""
        found: dict[int, Tensor] = {}
        t = self.locals[0].traveller
        whose = [(local, m) for local in self.locals for m in signal_members(local, self.wire.rank)]
        numbers = {id(m): local for local, m in whose}
        for batch in batches([m for _, m in whose], self.wire.max_bytes):
            S = signals_(Part(batch), self.context.rules[t.group], self.context.groups[t.group], Room(), self.context.scale)
            for m, value in zip(batch, S, strict=True):
                local = numbers[id(m)]
                spread = of_parameter(local.traveller.pieces[0], local.traveller.weights)
                found[local.traveller.number] = spread.reading.stack(value.reshape(local.p.shape))
        return found

    def write_(self) -> None:
        """Take the updates to weights."""
        for local in self.locals:
            t = local.traveller
            if t.number not in self.stacks:
                continue
            reading = of_parameter(t.pieces[0], t.weights).reading
            update = reading.unstack(self.stacks[t.number], local.p.shape)
            group, rule = self.context.groups[t.group], self.context.rules[t.group]
            for m in weight_members(local, self.wire.rank):
                retract_(Part([m]), update.reshape(1, *m.piece.blocks), lr_of(group), rule, group)


def _padded(parts: Sequence[Tensor], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Parts of different lengths as one batch: rows or columns of zeros change no sum."""
    longest = max(part.shape[dim] for part in parts)
    shape = list(parts[0].shape)
    shape[dim] = longest
    S = torch.zeros(len(parts), *shape, dtype=dtype, device=device)
    for whole, part in zip(S, parts, strict=True):
        whole.narrow(dim, 0, part.shape[dim]).copy_(part)
    return S
