"""Simulation: one optimizer step of a model on a mesh of any size, worked out from shapes by the cost model.

Blocks are spread, assigned and sent as the placements do it, by the same code, for all ranks at once; nothing is allocated
and no process group is needed. What a rank then takes is counted work over the rates of a stated machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from schatten.batching import MAX_BATCH_BYTES
from schatten.lab.errors import InputError
from schatten.lab.mesh import Mesh
from schatten.lab.shares import LATENCY, NAMES, Setting, Share, by_owners, here, together
from schatten.lab.traffic import ITEM, local, zeros
from schatten.layout import pieces
from schatten.placements.cost import work
from schatten.placements.here import on_entries
from schatten.placements.machine import Machine
from schatten.placements.ranks import ENTRY_FLOPS
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import Traveller
from schatten.placements.ways import ways
from schatten.routing import Plan
from schatten.routing.entries import Entry
from schatten.rule import Rule
from schatten.state import COUNTERS, fresh_state, suffixes

# A fused AdamW reads weight, gradient and two averages, and writes all but the gradient.
ADAMW_BYTES = 7 * ITEM

PYTHON = "Python"


@dataclass(frozen=True)
class Simulation:
    """One step: numbers per rank, the largest of all ranks unless said, and seconds by what they are spent on.

    `flops` is in products and factorisations, `mean_flops` its mean over ranks. `sent` are bytes over the network, `peak`
    bytes allocated beside parameters, gradients and state. `seconds` are of the busiest rank and of the collectives, which
    partly go on while buckets are computed: `hidden` of them take no time.
    """

    ranks: int
    matrices: int
    buckets: int
    collectives: int
    flops: float
    mean_flops: float
    idle_ranks: int
    sent: float
    peak: float
    state: float
    adamw_state: float
    seconds: dict[str, float]
    hidden: float
    bottleneck: str
    adamw_seconds: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values()) - self.hidden

    @property
    def imbalance(self) -> float:
        """The busiest rank's arithmetic over the mean."""
        return self.flops / self.mean_flops if self.mean_flops else 1.0


def simulate(
    routes: Plan,
    mesh: Mesh,
    rule: Rule,
    machine: Machine,
    *,
    dtype: str = "bfloat16",
    device: str = "cuda",
    max_bytes: int = MAX_BATCH_BYTES,
    owners: bool = False,
) -> Simulation:
    """A step of `rule` on the parameters of a plan, on every rank of `mesh`.

    `dtype` is the precision of products that the rule leaves open, `device` the kind they are computed on, `max_bytes` what a
    step may allocate at a time. `owners` is `placement="owners"`: replicas share small matrices, too.

    Example:
        >>> import torch, schatten
        >>> from schatten.lab.mesh import Mesh
        >>> from schatten.lab.simulate import simulate
        >>> from schatten.placements.machine import MACHINES
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, device="meta") for _ in range(4)))
        >>> step = simulate(schatten.plan(model), Mesh(shard=2), schatten.Rule(), MACHINES["h100"])
        >>> step.matrices, step.imbalance, step.bottleneck
        (4, 1.0, 'Python')
    """
    spectral = [entry for entry in routes if entry.route == "spectral"]
    if mesh.tp > 1 and not any(mesh.divides(entry) for entry in spectral):
        raise InputError(
            f"tp={mesh.tp} divides no matrix of this model: none has a name that says how, such as q_proj or c_fc."
        )
    travellers = travellers_of(spectral, mesh, rule, dtype)
    shares = _shares(travellers, Setting(machine, mesh.ranks, torch.device(device), dtype, max_bytes), owners)
    rest = _sum([local(mesh.of(entry), entry.shape) for entry in routes if entry.route != "spectral"], mesh.ranks)
    everything = _sum([rest, *(local(t.weights, t.shape) for t in travellers)], mesh.ranks)
    flops = _sum([share.flops for share in shares], mesh.ranks)
    seconds = {name: sum(share.seconds.get(name, 0.0) for share in shares) for name in NAMES}
    seconds[LATENCY] += machine.collective(0.0, mesh.ranks)  # what the hosts agree on
    seconds["AdamW of the rest"] = _adamw(rest, machine)
    hidden = sum(share.hidden for share in shares)
    device_seconds = sum(seconds.values()) - hidden
    bottleneck = max(seconds, key=lambda name: seconds[name])
    # A parameter takes as long as a piece.
    pieces = _sum([share.handled for share in shares], mesh.ranks).max()
    seconds[PYTHON] = machine.host * (len(routes) + float(pieces))
    if seconds[PYTHON] > (seconds[bottleneck] if device == "cpu" else device_seconds):
        bottleneck = PYTHON
    if device != "cpu":
        hidden += min(seconds[PYTHON], device_seconds)
    return Simulation(
        ranks=mesh.ranks,
        matrices=sum(share.matrices for share in shares),
        buckets=sum(share.buckets for share in shares),
        collectives=sum(share.collectives for share in shares) + (mesh.ranks > 1),
        flops=float(flops.max()),
        mean_flops=float(flops.mean()),
        idle_ranks=int((flops == 0).sum()),
        sent=float(_sum([share.sent for share in shares], mesh.ranks).max()),
        peak=max(share.peak for share in shares),
        state=float((_sum([_state(t) for t in travellers], mesh.ranks) + 2 * ITEM * rest).max()),
        adamw_state=float(2 * ITEM * everything.max()),
        seconds=seconds,
        hidden=hidden,
        bottleneck=bottleneck,
        adamw_seconds=_adamw(everything, machine),
    )


def _shares(travellers: Sequence[Traveller], setting: Setting, owners: bool) -> list[Share]:
    """Each matrix by the way the placements choose for it."""
    if setting.ranks == 1:
        return [here(travellers, setting, entries=False)]
    on_shards = {t.number for t in travellers if on_entries(t) and not t.weights.replicated}
    rest = [(t, torch.empty(t.shape, device="meta")) for t in travellers if t.number not in on_shards]
    found = ways(rest, setting.ranks, setting.device, owners=owners)
    own = {way: [t for t, _ in rest if found[t.number] == way] for way in ("here", "together", "owner")}
    own["entries"] = [t for t in travellers if t.number in on_shards]
    cost = {
        "entries": partial(here, entries=True),
        "here": partial(here, entries=False),
        "together": together,
        "owner": by_owners,
    }
    return [cost[way](members, setting) for way, members in own.items() if members]


# -- parameters --------------------------------------------------------------------------------------------------------


def travellers_of(spectral: Sequence[Entry], mesh: Mesh, rule: Rule, dtype: str) -> list[Traveller]:
    """Matrices as a schedule of the placements takes them."""
    return [_traveller(i, entry, mesh.of(entry), rule, dtype) for i, entry in enumerate(spectral)]


def _traveller(number: int, entry: Entry, on: Arrangement, rule: Rule, dtype: str) -> Traveller:
    own = pieces(entry.layout, entry.shape)
    p = torch.empty(entry.shape, device="meta")
    group = {"layout": entry.layout, "state_dtype": None, "rounding": "stochastic"}
    state = {key: tuple(t.shape) for key, t in fresh_state(p, group, rule).items() if key not in COUNTERS}
    cost = [work(rule, *piece.blocks[1:], dtype).flops + ENTRY_FLOPS * math.prod(piece.blocks[1:]) for piece in own]
    return Traveller(0, number, own, suffixes(own), rule, on, on, state, torch.float32, cost)


def _state(t: Traveller) -> Tensor:
    """Bytes of state on each rank: as the parameter lies, or divided by rows."""
    share = local(t.weights, t.shape) / math.prod(t.shape)
    return sum((ITEM * math.prod(shape) * share for shape in t.state.values()), torch.zeros_like(share))


def _adamw(entries: Tensor, machine: Machine) -> float:
    return float(entries.max()) * ADAMW_BYTES / machine.memory_bandwidth + machine.launch


def _sum(vectors: Sequence[Tensor], ranks: int) -> Tensor:
    return sum(vectors, zeros(ranks))
