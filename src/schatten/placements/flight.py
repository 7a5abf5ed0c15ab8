"""Flight: one bucket on its way through a step, from signals to owners and from there to weights."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from schatten.batching import Part, Room, batches, in_batches, keep_
from schatten.placements.exchange import Exchange, Gathering
from schatten.placements.local import Local, signal_members, weight_members
from schatten.placements.schedule import GRADIENT, SIGNAL, UPDATE, WEIGHT, Bucket, Item, Move, whole_step
from schatten.placements.spread import Spread
from schatten.retractions.core import lr_of
from schatten.rule import Rule
from schatten.state import COUNTERS, LOST, Member
from schatten.stepping import retract_, signals_
from schatten.stepping import whole_step as step_whole

if TYPE_CHECKING:
    from schatten.metrics import Recorder

# By item and block: the matrices of each field.
Values = dict[tuple[int, int], dict[str, Tensor]]


class Wire(NamedTuple):
    """The ranks a bucket travels between, in `group` to the owners and in `back` from them; where its blocks are computed, and
    what that may allocate.
    """

    group: dist.ProcessGroup | None
    back: dist.ProcessGroup | None
    rank: int
    size: int
    device: torch.device
    max_bytes: int


class Context(NamedTuple):
    """What a step knows: its param groups, their rules, and where to write what is measured, None where nothing is."""

    groups: Sequence[Mapping[str, Any]]
    rules: Sequence[Rule]
    scale: Tensor | None
    recorder: "Recorder | None"


class Flight:
    """One bucket on its way through a step."""

    def __init__(self, team: Wire, bucket: Bucket, moving: Mapping[int, Local], context: Context) -> None:
        self.team, self.bucket, self.context = team, bucket, context
        self.moving = moving
        self.travellers = list({item.traveller.number: item.traveller for item in bucket.items}.values())
        self.dtype = self.travellers[0].dtype

    # -- to the owners -------------------------------------------------------------------------------------------------

    def start(self, keep: bool = True) -> None:
        """Compute signals of this rank's part and send owners what they need; `keep` their state if this is the step."""
        signals = self._signals(keep)
        items = enumerate(self.bucket.items)
        stacks = [{field: self._stack(i, field, signals) for field in item.incoming} for i, item in items]
        self.sent = self._exchange(
            [[self._piece(stacks, move) for move in moves] for moves in self.bucket.given],
            self.bucket.taken,
            self.bucket.travels_in,
            self.team.group,
        )

    def arrived(self) -> bool:
        """Whether `compute` has nothing to wait for."""
        return self.sent.arrived()

    def take(self, moving: Mapping[int, Local], context: Context) -> None:
        """Go on as a step of `moving`, of which signals were sent before it was decided, or of nothing."""
        self.moving, self.context = moving, context
        self._signals(keep=True)

    def let_go(self) -> None:
        """Let the loop free the gradients: weights are written without them."""
        for local in self.moving.values():
            # A member has one, of its weight's form.
            local.p.grad = local.p.detach()

    def _locals(self) -> list[Local]:
        return [self.moving[t.number] for t in self.travellers if t.number in self.moving]

    def _signals(self, keep: bool) -> dict[tuple[int, str], Tensor]:
        """Signals by parameter and piece, or of whole shards under the suffix ""; none where owners compute them."""
        found: dict[tuple[int, str], Tensor] = {}
        for own in self._by_group():
            rule = self.context.rules[own[0].traveller.group]
            if whole_step(rule):
                continue
            numbers, members = self._members(own, signal_members)
            for batch in batches(members, self.team.max_bytes):
                # A room of its own, as signals stay until they have been sent.
                group = self.context.groups[own[0].traveller.group]
                S = signals_(Part(batch), rule, group, Room(), self.context.scale, keep=keep)
                found.update({(numbers[id(m)], m.suffix): value for m, value in zip(batch, S, strict=True)})
        return found

    def _by_group(self) -> list[list[Local]]:
        found: dict[int, list[Local]] = defaultdict(list)
        for local in self._locals():
            found[local.traveller.group].append(local)
        return list(found.values())

    def _members(self, own: Sequence[Local], of: Callable[[Local, int], list[Member]]) -> tuple[dict[int, int], list[Member]]:
        """Members of these parameters, and whose each is."""
        by_local = [(local, of(local, self.team.rank)) for local in own]
        numbers = {id(m): local.traveller.number for local, members in by_local for m in members}
        return numbers, [m for _, members in by_local for m in members]

    def _stack(self, i: int, field: str, signals: Mapping[tuple[int, str], Tensor]) -> Tensor | None:
        """This rank's part of what travels, as the field's spread reads it; None where it has nothing to send."""
        item = self.bucket.items[i]
        spread, local = item.incoming[field], self.moving.get(item.traveller.number)
        if local is None:
            return None
        if field == SIGNAL:
            S = signals.get((local.traveller.number, item.suffix if spread.on.replicated else ""))
            if S is None:
                return None
            return S if spread.on.replicated else spread.reading.stack(S.reshape(self._part_shape(spread)))
        if field == GRADIENT:
            assert local.p.grad is not None
            t = local.p.grad
        elif field == WEIGHT:
            t = local.p.to(self.dtype) + local.state[LOST] if LOST in local.state else local.p
        else:
            t = local.state[field]
        in_shape = tuple(item.traveller.state.get(field, item.traveller.shape)) == item.traveller.shape
        return item.piece.of(t) if in_shape and spread.on.replicated else spread.reading.stack(t)

    def _part_shape(self, spread: Spread) -> list[int]:
        return [len(held) for held in spread.on.held(spread.shape, self.team.rank)]

    def _piece(self, stacks: list[dict[str, Tensor | None]], move: Move) -> Tensor:
        stack = stacks[move.item][move.field]
        if stack is None:
            return torch.zeros(move.cut.entries, dtype=self.dtype, device=self.team.device)
        return move.cut.of_stack(stack)

    def _exchange(
        self, pieces: list[list[Tensor]], received: list[list[Move]], needed: bool, group: dist.ProcessGroup | None
    ) -> Exchange:
        sizes = [sum(move.cut.entries for move in moves) for moves in received]
        team = self.team
        return Exchange(pieces, sizes, self.dtype, team.device, group, team.rank, needed=needed)

    # -- at the owners -------------------------------------------------------------------------------------------------

    def compute(self) -> None:
        """Put the blocks of this rank together, compute them, and send every holder its part."""
        blocks = self._blocks()
        values: Values = {}
        alike: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for i, block in blocks:
            item = self.bucket.items[i]
            shapes = tuple((name, item.incoming[key].blocks[block].shape) for key, name in item.names.items())
            alike[item.traveller.group, item.piece.blocks[1:], shapes].append((i, block))
        for same in alike.values():
            item = self.bucket.items[same[0][0]]
            fan_out, fan_in = item.piece.blocks[1:]
            kept = sum(math.prod(item.incoming[key].blocks[same[0][1]].shape) for key in item.names) / (fan_out * fan_in)
            team = self.team
            for batch in in_batches(same, fan_out * fan_in, kept, self.dtype, team.device, team.max_bytes):
                values.update(self._computed(batch, blocks))
                for at in batch:
                    del blocks[at]
        if self.bucket.shared and self.bucket.travels_out:
            own = [self._result(values, move) for move in self.bucket.returned[self.team.rank]]
            sizes = [sum(move.cut.entries for move in moves) for moves in self.bucket.kept]
            team = self.team
            self.back: Exchange | Gathering = Gathering(own, sizes, self.dtype, team.device, team.back)
        else:
            pieces = [[self._result(values, move) for move in moves] for moves in self.bucket.returned]
            self.back = self._exchange(pieces, self.bucket.kept, self.bucket.travels_out, self.team.back)

    def _blocks(self) -> Values:
        """What has arrived, as blocks (rows, columns) of each field; none of parameters that do not move."""
        blocks: Values = defaultdict(dict)
        arrived = self.sent.wait()
        del self.sent
        for move, item, values in self._taken_apart(arrived, self.bucket.taken):
            own = blocks[move.item, move.block]
            if move.field not in own:
                block = item.incoming[move.field].blocks[move.block]
                own[move.field] = values.new_empty(len(block.rows), len(block.columns))
            move.cut.into_block_(own[move.field], values)
        return dict(blocks)

    def _taken_apart(
        self, arrived: Sequence[Tensor], received: Sequence[Sequence[Move]]
    ) -> Iterator[tuple[Move, Item, Tensor]]:
        """The pieces of what each rank has sent, flat, but for those of parameters that do not move."""
        for flat, moves in zip(arrived, received, strict=True):
            pieces = flat.split([move.cut.entries for move in moves])
            for move, values in zip(moves, pieces, strict=True):
                item = self.bucket.items[move.item]
                if item.traveller.number in self.moving:
                    yield move, item, values

    def _computed(self, batch: list[tuple[int, int]], blocks: Values) -> Values:
        """What is sent back of equal blocks of one param group."""
        items = [self.bucket.items[i] for i, _ in batch]
        group, rule = self.context.groups[items[0].traveller.group], self.context.rules[items[0].traveller.group]

        def stacked(fields: Sequence[str]) -> Tensor:
            shape = items[0].incoming[fields[0]].blocks[batch[0][1]].shape
            return torch.stack([blocks[at][field].view(shape) for at, field in zip(batch, fields, strict=True)]).unsqueeze(1)

        keys = [{name: key for key, name in item.names.items()} for item in items]
        state = {name: stacked([own[name] for own in keys]) for name in keys[0]}
        for name in COUNTERS:
            counts = [self.moving[item.traveller.number].state[name] for item in items]
            state[name] = torch.stack([count.to(self.dtype).view(1, 1, 1) for count in counts])
        if whole_step(rule):
            W, G = (stacked([field] * len(batch)) for field in (WEIGHT, GRADIENT))
            W, D, length, new = step_whole(W, G, state, rule, group, self.context.scale)
            result = {WEIGHT: W}
        else:
            D, new = rule.direction(stacked([SIGNAL] * len(batch)), state, group)
            factor = rule.scale(D)
            length = lr_of(group) * factor
            result = {UPDATE: D * factor}
        if self.context.recorder is not None:
            self.context.recorder.direction([(i.traveller.number, i.suffix) for i in items], D, length, rule)
        return {
            at: {
                **{field: t[n, 0] for field, t in result.items()},
                **{own.get(name, name): t[n, 0] for name, t in {**state, **new}.items() if name in own},
            }
            for n, (at, own) in enumerate(zip(batch, keys, strict=True))
        }

    def _result(self, values: Values, move: Move) -> Tensor:
        own = values.get((move.item, move.block))
        if own is None:
            return torch.zeros(move.cut.entries, dtype=self.dtype, device=self.team.device)
        block = self.bucket.items[move.item].outgoing[move.field].blocks[move.block]
        return move.cut.of_block(own[move.field].reshape(len(block.rows), len(block.columns)))

    # -- back at the holders -------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """Wait for what owners have sent."""
        self.stacks = self._stacks()

    def write_(self) -> None:
        """Take it to weights and state."""
        stacks = self.stacks
        for own in self._by_group():
            group, rule = self.context.groups[own[0].traveller.group], self.context.rules[own[0].traveller.group]
            numbers, members = self._members(own, weight_members)
            for batch in batches(members, self.team.max_bytes):
                part, whole = Part(batch), whole_step(rule)
                values = [stacks[numbers[id(m)], m.suffix, WEIGHT if whole else UPDATE].to(m.p.device) for m in batch]
                value = torch.stack([v.reshape(m.piece.blocks) for v, m in zip(values, batch, strict=True)])
                if whole:
                    part.keep_weights_(value, group["rounding"])
                else:
                    retract_(part, value, lr_of(group), rule, group)
            for local in own:
                self._keep_state_(local, stacks)

    def _stacks(self) -> dict[tuple[int, str, str], Tensor]:
        """What has arrived, in the shape of this rank's part of each field; by parameter, piece and field."""
        found: dict[tuple[int, str, str], Tensor] = {}
        arrived = self.back.wait()
        del self.back
        for move, item, values in self._taken_apart(arrived, self.bucket.kept):
            spread = item.outgoing[move.field]
            at = (item.traveller.number, self._suffix(item, move.field), move.field)
            if at not in found:
                found[at] = spread.reading.empty(self._part_shape(spread), values)
            move.cut.into_stack_(found[at], values)
        shaped = {}
        for item in self.bucket.items:
            for field, spread in item.outgoing.items():
                at = (item.traveller.number, self._suffix(item, field), field)
                if at in found:
                    shaped[at] = spread.reading.unstack(found[at], self._part_shape(spread))
        return shaped

    @staticmethod
    def _suffix(item: Item, field: str) -> str:
        """Pieces of a shard fill one tensor together, those of a whole parameter one each."""
        return item.suffix if item.outgoing[field].on.replicated else ""

    def _keep_state_(self, local: Local, stacks: Mapping[tuple[int, str, str], Tensor]) -> None:
        t = local.traveller
        items = [item for item in self.bucket.items if item.traveller.number == t.number]
        members = {m.suffix: m for m in signal_members(local, self.team.rank)}
        for item in items:
            for key, name in item.names.items():
                suffix = self._suffix(item, key)
                value = stacks.get((t.number, suffix, key))
                if value is None:
                    continue
                if t.state[key] == t.shape:
                    Part([members[suffix]]).keep_state_({name: value.reshape(1, *members[suffix].piece.blocks)})
                else:
                    keep_(local.state[key], value.to(local.p.device), local.finite)
