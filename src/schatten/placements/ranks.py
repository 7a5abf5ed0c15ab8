"""Ranks: which process groups the parameters of an optimizer lie on, and what their ranks decide together in a step.

The placement is found from the parameters: a DTensor lies on its mesh, a plain tensor on this process alone unless
`placement` and a process group say that all ranks of that group hold it.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from schatten.finite import looking_is_free
from schatten.layout import pieces
from schatten.placements import text
from schatten.placements.agreement import agree, host_group, new_group, patience
from schatten.placements.cost import block_flops
from schatten.placements.flight import Context
from schatten.placements.gradients import is_elsewhere, is_finite, on_all
from schatten.placements.here import adamw_, entries_, replicated_
from schatten.placements.local import Local, plain, plain_parameter
from schatten.placements.regions import Arrangement, arrangement, everywhere
from schatten.placements.schedule import Traveller
from schatten.placements.states import arranged, like_parameter, sharded
from schatten.placements.team import Team
from schatten.placements.ways import ways
from schatten.rule import Rule
from schatten.state import SCALES, suffixes, wide

if TYPE_CHECKING:
    from schatten.placements.overlap import Overlap

PLACEMENTS = ("local", "owners", "zero1")

# Work on an entry beside the products, in floating point operations: it decides where a rule has none.
ENTRY_FLOPS = 50


@dataclass
class Member:
    """One parameter on a group of ranks: its group and number in the optimizer, how it lies on them, and what a spectral rule
    needs to know of it.
    """

    group: int
    number: int
    p: Tensor
    weights: Arrangement
    traveller: Traveller | None
    way: str = "here"


@dataclass
class Crew:
    """The ranks of one process group, what they have in common, and the team of those parameters that travel."""

    group: dist.ProcessGroup
    host: dist.ProcessGroup
    members: list[Member] = field(default_factory=list)
    team: Team | None = None
    identity: int = 0


class Ranks:
    """The crews of an optimizer. `placement` and `process_group` are the optimizer's options, `replicas` the group of the
    DistributedDataParallel module it was given, if it was.
    """

    def __init__(
        self,
        placement: str | None,
        process_group: dist.ProcessGroup | None,
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        if placement is not None and placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))} or None, got {placement!r}.")
        shares = placement in ("owners", "zero1")
        if shares and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"placement={placement!r} shares the work of a step among the ranks of a process group, but none was started: "
                f"call torch.distributed.init_process_group first, or leave placement out."
            )
        if process_group is not None and not shares:
            raise ValueError(
                f"process_group names the ranks that share a step, which placement={placement!r} does not: pass "
                f"placement='owners' or 'zero1' with it."
            )
        # A placement that was found may leave small matrices to every rank.
        self.chosen = placement is not None
        self.placement = "owners" if placement is None and replicas is not None else placement
        self.process_group = process_group if process_group is not None or not replicas else replicas
        self.max_bytes = 0
        # Whether a step has failed between ranks, after which momentum is no longer that of the weights.
        self.torn = False
        # Whether some parameters are this process's own.
        self.alone = True
        self.overlap: Overlap | None = None
        # What overlaps has process groups of its own, by their ranks.
        self.aside: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
        self.crews: list[Crew] = []
        self.seen: Any = None
        self._groups: dict[tuple[int, ...], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy finds again: process groups stay where they are, and all ranks of a job are one without its name."""
        own = self.process_group
        if own is not None and dist.get_world_size(own) != dist.get_world_size():
            raise TypeError("An optimizer whose process_group is not that of all ranks cannot be copied or pickled.")
        return {**vars(self), "process_group": None, "crews": [], "seen": None, "_groups": {}, "overlap": None, "aside": {}}

    # -- state -----------------------------------------------------------------------------------------------------------

    def fresh(self, p: Tensor, make: Callable[[Tensor], dict[str, Tensor]], spectral: bool) -> dict[str, Tensor]:
        """The state that `make` gives for a whole parameter, as it lies on the ranks of `p`."""
        if isinstance(p, DTensor):
            state = make(like_parameter(p))
            return arranged(state if arrangement(p).replicated else _in_rows(state, p), p.shape, p)
        state = make(p)
        if self.placement == "zero1" and spectral:
            return sharded(_in_rows(state, p), p.shape, _mesh(self._plain_group(), p.device.type))
        return state

    def _plain_group(self) -> dist.ProcessGroup:
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        assert group is not None
        return group

    # -- who lies where --------------------------------------------------------------------------------------------------

    def look(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        rule_of: Callable[[Mapping[str, Any]], Rule],
        seen: Any,
        max_bytes: int,
    ) -> bool:
        """Find the crews anew if `seen`, what the groups were when they were last checked, has changed; whether it had.

        All ranks of a group must come here together, as new process groups are made for meshes of several dimensions.
        """
        if self.seen is not None and self.seen == seen:
            return False
        crews: dict[tuple[int, ...], Crew] = {}
        number = 0
        for g, group in enumerate(groups):
            for p in group["params"]:
                if p.numel() and (found := self._lies(p)) is not None:
                    ranks, weights, averages = found
                    if ranks not in crews:
                        crews[ranks] = Crew(*self._group_of(ranks, p))
                    t = None
                    if group["algorithm"] == "spectral":
                        rule = rule_of(group)
                        t = _traveller(g, number, p, group, state[p], rule, weights, averages)
                    crews[ranks].members.append(Member(g, number, p, weights, t))
                number += 1
        for crew in crews.values():
            spectral = [(m.traveller, m.p) for m in crew.members if m.traveller is not None]
            if spectral:
                device, size = _device(spectral[0][1]), dist.get_world_size(crew.group)
                found = ways(spectral, size, device, owners=self.chosen)
                for m in crew.members:
                    m.way = found.get(m.number, "here")
                by_way = {way: [t for t, _ in spectral if found[t.number] == way] for way in ("owner", "together")}
                crew.team = Team(crew.group, by_way["owner"], by_way["together"], device, max_bytes)
            names = [(m.group, m.number, tuple(m.p.shape)) for m in crew.members]
            crew.identity = zlib.crc32(repr(names).encode()) ^ (crew.team.fingerprint() if crew.team else 0)
        self.crews, self.seen, self.max_bytes = list(crews.values()), seen, max_bytes
        self.alone = number > len(self.numbers)
        return True

    def _lies(self, p: Tensor) -> tuple[tuple[int, ...], Arrangement, Arrangement] | None:
        if isinstance(p, DTensor):
            on = arrangement(p)
            return tuple(sorted(p.device_mesh.mesh.flatten().tolist())), on, on
        if self.placement in (None, "local"):
            return None
        ranks = dist.get_process_group_ranks(self._plain_group())
        on = everywhere(len(ranks))
        return tuple(ranks), on, on if self.placement == "owners" else Arrangement(on.mesh, (Shard(0),))

    def _group_of(self, ranks: tuple[int, ...], p: Tensor) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        if ranks not in self._groups:
            if not isinstance(p, DTensor):
                group = self._plain_group()
            elif p.device_mesh.ndim == 1:
                group = p.device_mesh.get_group()
            elif ranks == tuple(range(dist.get_world_size())):
                group = dist.group.WORLD
            else:
                # A mesh's own groups have torch's half an hour.
                assert dist.group.WORLD is not None
                group = new_group(ranks, None, patience(dist.group.WORLD))
            assert group is not None
            self._groups[ranks] = (group, host_group(group))
        return self._groups[ranks]

    def settle(self) -> None:
        """Write what an overlapped step has left to the next forward."""
        if self.overlap is not None:
            self.overlap.finish()

    def refuse_torn(self) -> None:
        """Raise RuntimeError if a step was broken off, because its state is worth no further step and no checkpoint."""
        if self.torn:
            raise RuntimeError(
                "The last step was broken off while ranks exchanged matrices, so momentum has moved and weights have not, or "
                "not all if steps overlap or need more than max_batch_bytes / 8: start the ranks again and load the last "
                "checkpoint."
            )

    @property
    def numbers(self) -> frozenset[int]:
        """The parameters that ranks step together."""
        return frozenset(m.number for crew in self.crews for m in crew.members)

    def text(self) -> str:
        """Where the parameters lie and how their directions are computed, for a plan."""
        if not (dist.is_available() and dist.is_initialized()):
            return ""
        found = []
        for crew in self.crews:
            p, ranks = crew.members[0].p, text.plural(dist.get_world_size(crew.group), "rank")
            holders = text.sharded(p) if isinstance(p, DTensor) else f"{self.placement}, {ranks}"
            found.append(text.Place(holders, [(m.traveller, m.way) for m in crew.members if m.traveller is not None]))
        return text.line(found, dist.get_world_size(), self.alone)

    # -- a step ----------------------------------------------------------------------------------------------------------

    def agree(
        self,
        groups: Sequence[Mapping[str, Any]],
        squares: Sequence[bool],
        failure: Exception | None,
        found_inf: Tensor | None,
    ) -> dict[int, tuple[bool, Tensor | None]]:
        """Whether each parameter moves, by its number, with a flag on its device where that decides. Raises `failure` on the
        rank that has one and RuntimeError on the others, which then have changed nothing either.
        """
        decided: dict[int, tuple[bool, Tensor | None]] = {}
        for crew in self.crews:
            free = [looking_is_free(plain(m.p)) for m in crew.members]
            finite = [] if failure else [is_finite(m.p, squares[m.group], found_inf) for m in crew.members]
            bad = [here and not bool(f) for here, f in zip(free, finite, strict=True)] if finite else [False] * len(free)
            present = [not failure and m.p.grad is not None for m in crew.members]
            numbers = [_numbers(groups[g]) for g in sorted({m.group for m in crew.members})]
            verdict = agree(
                present,
                bad,
                [not failure and is_elsewhere(m.p) for m in crew.members],
                crew.host,
                dist.get_rank(crew.host),
                failed=failure is not None,
                fingerprint=zlib.crc32(repr((numbers, crew.identity)).encode()),
                ahead=self.overlap.ahead(crew) if self.overlap is not None else (0, 0),
            )
            if self.overlap is not None:
                self.overlap.agreed(crew, verdict.ahead)
            if failure is None and verdict.failed is not None:
                failure = RuntimeError(
                    f"Rank {verdict.failed} of the process group has refused this step; its own error says why. No weight was "
                    f"changed on any rank."
                )
            if failure is None and verdict.different:
                failure = RuntimeError(
                    f"Ranks differ in the numbers of param groups {sorted({m.group for m in crew.members})}, such as lr, in "
                    f"max_batch_bytes or in the parameters they hold: build the same optimizer and schedule on every rank. No "
                    f"weight was changed."
                )
            if failure is not None:
                continue
            flags = on_all(finite, crew.group) if not all(free) else finite
            for i, m in enumerate(crew.members):
                # Copies would drift apart, and bringing a gradient into its parameter's placement takes that of all ranks.
                needs_all = m.weights.copies > 1 or verdict.elsewhere[i]
                there = verdict.present[i] and not (verdict.absent[i] and needs_all)
                if verdict.present[i]:
                    decided[m.number] = (there and not verdict.bad[i], None if free[i] else flags[i])
        if failure is not None:
            if self.overlap is not None:
                self.overlap.drop()
            raise failure
        return decided

    def step_(
        self,
        decided: Mapping[int, tuple[bool, Tensor | None]],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        context: Context,
        found_inf: Tensor | None,
    ) -> None:
        """Count and step all parameters of the crews: first what takes other ranks, then what cannot fail."""
        waiting = []
        here: list[tuple[Member, Tensor, dict[str, Tensor], Tensor | None, int]] = []
        for crew in self.crews:
            rank, moving = dist.get_rank(crew.group), {}
            for m in crew.members:
                if m.number not in decided:
                    continue
                moves, finite = decided[m.number]
                own = {key: plain(value) for key, value in state[m.p].items()}
                if not moves:
                    own["skipped"].add_(1)
                    continue
                p = plain_parameter(m.p)
                if context.recorder is not None:
                    context.recorder.gradient(m.number, p)
                if m.traveller is not None:
                    own["step"].add_(1 if finite is None else finite)
                    if finite is not None:
                        own["skipped"].add_(~finite)
                if m.traveller is not None and m.way != "here":
                    moving[m.number] = Local(m.traveller, p, own, finite)
                else:
                    here.append((m, p, own, finite, rank))
            if crew.team is not None:
                # Until all has arrived: a rank that dies leaves momentum ahead of the weights.
                self.torn = True
                if self.overlap is not None:
                    self.overlap.fly(crew, moving, context)
                    waiting += crew.team.together(moving, context)
                else:
                    waiting += crew.team.arrive(moving, context)
        self.torn = False
        for computed in waiting:
            computed.write_()
        for m, p, own, finite, rank in here:
            if m.traveller is None:
                adamw_(m.group, m.number, m.weights, p, own, finite, rank, context, found_inf)
            elif not m.weights.replicated:
                entries_(Local(m.traveller, p, own, finite), rank, context)
        whole = [
            Local(m.traveller, p, own, finite)
            for m, p, own, finite, _ in here
            if m.traveller is not None and m.weights.replicated
        ]
        replicated_(whole, 0, context, self.max_bytes)


def _in_rows(state: dict[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """`state`, which must not be in blocks of 256 entries: a shard begins anywhere."""
    if any(SCALES in key for key in state):
        raise ValueError(
            f"state_dtype='int8' keeps one scale for 256 entries, which shards cut apart, but a parameter of shape "
            f"{tuple(p.shape)} is divided among ranks: take state_dtype='bfloat16'."
        )
    return state


def _numbers(group: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a group; what lies on a device is not looked at."""
    found = []
    for key, value in sorted(group.items()):
        if isinstance(value, Tensor):
            value = float(value) if value.device.type == "cpu" and value.numel() == 1 else "on a device"
        if isinstance(value, (int, float, str, tuple)):
            found.append((key, repr(value)))
    return found


def _device(p: Tensor) -> torch.device:
    """Where blocks are computed: a sharded parameter may be offloaded to the host while its mesh has devices."""
    if not isinstance(p, DTensor):
        return p.device
    kind = p.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def _traveller(
    g: int,
    number: int,
    p: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
    rule: Rule,
    weights: Arrangement,
    averages: Arrangement,
) -> Traveller:
    own = pieces(group["layout"], p.shape)
    shapes = {key: tuple(t.shape) for key, t in state.items()}
    costs = [block_flops(rule, *piece.blocks[1:]) + ENTRY_FLOPS * piece.blocks[1] * piece.blocks[2] for piece in own]
    return Traveller(g, number, own, suffixes(own), rule, weights, averages, shapes, wide(p.dtype), costs)


@lru_cache(maxsize=16)
def _mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)
