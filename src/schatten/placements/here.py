"""Here: the steps that need no other rank, on what this one has: AdamW, rules that act on entries, replicated matrices."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from schatten.adamw import adamw_step_
from schatten.batching import Part, Room, batches
from schatten.layout import pieces
from schatten.maps import L1
from schatten.placements.flight import Context
from schatten.placements.local import Local, shard_number, signal_members, weight_members
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import Traveller
from schatten.retractions.core import lr_of
from schatten.scales import Scale
from schatten.state import Member, wide
from schatten.stepping import retract_, signals_, step_


def on_entries(t: Traveller) -> bool:
    """Whether a rule acts on entries alone, so that a shard is stepped where it is."""
    rule, same = t.rule, len({piece.blocks[1:] for piece in t.pieces}) == 1
    separable = isinstance(rule.map, L1) and rule.map.over == "entries" and isinstance(rule.scale, Scale)
    return same and separable and rule.signal.elementwise and rule.retraction.elementwise


def entries_(local: Local, rank: int, context: Context) -> None:
    """A rule that acts on entries alone, on this rank's own."""
    t = local.traveller
    group, rule = context.groups[t.group], context.rules[t.group]
    factor = rule.scale.factor(*t.pieces[0].blocks[1:])
    for member in weight_members(local, rank):
        part = Part([member])
        D, _ = rule.direction(signals_(part, rule, group, Room(), context.scale), {}, group)
        if context.recorder is not None:
            context.recorder.update([t.number], D[:, 0] * (lr_of(group) * factor))
        retract_(part, D, lr_of(group) * factor, rule, group)


def replicated_(own: Sequence[Local], rank: int, context: Context, max_bytes: int) -> None:
    """Whole matrices that every rank computes for itself."""
    room, by_group = Room(), defaultdict(list)
    for local in own:
        by_group[local.traveller.group] += signal_members(local, rank)
    for g, members in by_group.items():
        for batch in batches(members, max_bytes):
            step_(Part(batch), context.rules[g], context.groups[g], room, context.scale, context.recorder)


def adamw_(
    g: int,
    number: int,
    on: Arrangement,
    p: Tensor,
    state: dict[str, Tensor],
    finite: Tensor | None,
    rank: int,
    context: Context,
    found_inf: Tensor | None,
) -> None:
    """AdamW on this rank's part of a parameter."""
    if not p.numel():
        state["step"].add_(1 if finite is None else finite)
        if finite is not None:
            state["skipped"].add_(~finite)
        return
    group, recorder = context.groups[g], context.recorder
    before = p.to(wide(p.dtype), copy=True) if recorder is not None else None
    # Ranks have looked at the gradient already.
    finite = torch.ones((), dtype=torch.bool, device=p.device) if finite is None else finite
    member = Member(shard_number(number, on, rank), p, pieces("flat", p.shape)[0], "", state, finite)
    adamw_step_(member, group, found_inf, context.scale)
    if recorder is not None and before is not None:
        recorder.change(number, before, p, lr_of(group) * group["weight_decay"])
