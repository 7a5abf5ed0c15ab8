"""Ways: how the parameters on a group of ranks are computed, by their placement and by the model of `schatten.placements.cost`.

| way | what happens |
|---|---|
| `here` | each rank steps what it has: AdamW, rules on entries, matrices so small that sharing them costs more |
| `together` | a matrix cut along its longer side stays where it is, and ranks add up its products (`placements.gram`) |
| `owner` | a block travels to one rank and its update back |

All of it from shapes and rules, so that every rank comes to the same.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from schatten.placements.cost import replicate, work
from schatten.placements.gram import cheaper
from schatten.placements.here import on_entries
from schatten.placements.machine import MACHINES, Machine
from schatten.placements.schedule import Traveller
from schatten.placements.slab import side


def ways(
    travellers: Sequence[tuple[Traveller, torch.Tensor]], ranks: int, device: torch.device, *, owners: bool
) -> dict[int, str]:
    """The way of each spectral parameter, by its number. `owners` has plain parameters computed by owners whatever it costs."""
    machine, dtype = (MACHINES["cpu"], "float32") if device.type == "cpu" else (MACHINES["h100"], "bfloat16")
    found, alike = {}, defaultdict(list)
    for t, p in travellers:
        if isinstance(p, DTensor) and on_entries(t):
            found[t.number] = "here"
            continue
        can = "replicate" if t.weights.replicated and (isinstance(p, DTensor) or not owners) else None
        if not t.weights.replicated and t.weights.copies == 1 and side(t, ranks) is not None:
            can = "together"
        blocks = tuple(piece.blocks for piece in t.pieces)
        alike[t.group, t.dtype, blocks, can].append(t)
    for (_, _, _, can), same in alike.items():
        way = "owner"
        if can == "replicate" and all(_replicates(same, p, ranks, machine, dtype) for p in range(len(same[0].pieces))):
            way = "here"
        if can == "together" and all(_together(same, p, ranks, machine, dtype) for p in range(len(same[0].pieces))):
            way = "together"
        found.update({t.number: way for t in same})
    return found


def _replicates(same: Sequence[Traveller], p: int, ranks: int, machine: Machine, dtype: str) -> bool:
    t, (blocks, fan_out, fan_in) = same[0], same[0].pieces[p].blocks
    size = fan_out * fan_in * t.dtype.itemsize
    operations = work(t.rule, fan_out, fan_in, dtype).operations
    # LAPACK's last bits differ from run to run, and ranks would drift apart.
    if any(operation.factorisation for operation in operations):
        return False
    return replicate(operations, blocks * len(same), size, ranks, machine)


def _together(same: Sequence[Traveller], p: int, ranks: int, machine: Machine, dtype: str) -> bool:
    t, (blocks, *sizes) = same[0], same[0].pieces[p].blocks
    map: Any = t.rule.map
    return cheaper(map, min(sizes), max(sizes), ranks, blocks * len(same), machine, dtype)
