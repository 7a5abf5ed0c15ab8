"""State: what is kept for a parameter between steps, and in which form.

A tensor of a rule's state with one entry for each of the matrix's is kept in the parameter's own shape, however the
parameter is read, so that state is sharded, moved and saved as the parameter is. Any other (a factor, a second moment
of rows) has its own shape, and, where the parameter has blocks of several sizes, one tensor for each, ".0", ".1", ...
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schatten.blockwise import blocks_of
from schatten.layout import Piece, pieces
from schatten.rounding import HALF
from schatten.rule import Rule

COUNTERS = ("step", "skipped")

# What torch's AdamW keeps.
ADAMW = ("exp_avg", "exp_avg_sq")

# What Kahan's rounding took from a half-precision parameter.
LOST = "compensation"

# Signed running averages, which `state_dtype` may shorten: their errors average out. A second moment's would not, as
# its root divides the update.
AVERAGES = ("momentum_buffer", "exp_avg")

SCALES = "_scales"

STATE_DTYPES = (None, "bfloat16", "int8")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision of state and arithmetic: the parameter's, but at least fp32."""
    return torch.float32 if dtype in HALF else dtype


def suffixes(pieces: Sequence[Piece]) -> list[str]:
    """What each piece adds to the names of its own state."""
    return [f".{i}" for i in range(len(pieces))] if len(pieces) > 1 else [""]


@torch.no_grad()
def fresh_state(p: Tensor, group: Mapping[str, Any], rule: Rule | None) -> dict[str, Tensor]:
    """The state of a new parameter of a group with `rule`, or of an AdamW group (None), with its counters."""
    if rule is None:
        state = {key: torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device) for key in ADAMW}
    else:
        state = _of_rule(p, pieces(group["layout"], p.shape), rule, group["state_dtype"])
    if group["rounding"] == "kahan" and p.dtype != wide(p.dtype):
        state[LOST] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
    counters = {key: torch.zeros((), device=p.device) for key in COUNTERS}
    return {**state, **counters}


def follow_device_(state: dict[str, Tensor], p: Tensor) -> bool:
    """Take state along with a model that was moved after construction, as torch's lazy state would go; whether it was."""
    moved = state["step"].device != p.device
    if moved:
        for key, value in state.items():
            state[key] = value.to(p.device)
    return moved


def _of_rule(p: Tensor, own: Sequence[Piece], rule: Rule, state_dtype: str | None) -> dict[str, Tensor]:
    """As `rule.init` makes it for each of the parameter's pieces."""
    like = [torch.empty(piece.blocks, dtype=wide(p.dtype), device=p.device) for piece in own]
    made = [rule.init(W) for W in like]
    state: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for one in made for key in one):
        values = [one.get(key) for one in made]
        if any(value is None or value.shape != W.shape for value, W in zip(values, like, strict=True)):
            state.update({key + s: _own_form(v, p) for s, v in zip(suffixes(own), values, strict=True) if v is not None})
            continue
        short = state_dtype if key in AVERAGES else None
        dtype = getattr(torch, short) if short else wide(p.dtype)
        kept = torch.empty(p.shape, dtype=dtype, device=p.device)
        for piece, made_value, suffix in zip(own, (one[key] for one in made), suffixes(own), strict=True):
            place = piece.view(kept)
            place.copy_(made_value.reshape(place.shape))
            if short == "int8":
                scales = (*piece.blocks[:2], blocks_of(piece.blocks[2]))
                state[key + SCALES + suffix] = _own_form(torch.zeros(scales, device=p.device), p)
        state[key] = kept
    # One that a simulated worker keeps for itself is of another shape, and stays long.
    if state_dtype is not None and not set(AVERAGES) & {key for key, t in state.items() if t.shape == p.shape}:
        raise ValueError(
            f"state_dtype={state_dtype!r} shortens running averages ({', '.join(AVERAGES)}), of which this rule keeps none in "
            f"the parameter's shape: it has {sorted(state) or 'no state'}. Leave state_dtype out."
        )
    return state


def _own_form(value: Tensor, p: Tensor) -> Tensor:
    """A tensor (blocks, ...) without a single block's dimension; one more where it would then have the parameter's shape."""
    kept = value[0] if value.shape[0] == 1 else value
    return kept.unsqueeze(0) if leading(kept.shape, p.shape) is not None else kept


def leading(own: Sequence[int], shape: Sequence[int]) -> int | None:
    """How many dimensions of size 1 stand before a parameter's `shape` in a state's `own`; None if it is no such shape."""
    lead = len(own) - len(shape)
    found = lead >= 0 and tuple(own[lead:]) == tuple(shape) and all(n == 1 for n in own[:lead])
    return lead if found else None


# 2^32 over the golden ratio, odd: steps that follow each other have seeds far apart.
SPREAD = 0x9E3779B1


class Member(NamedTuple):
    """Equal blocks of one parameter in a batch: `number` is the parameter's in the optimizer, `suffix` that of its own state.

    `finite` is a flag on the device; None where the gradient is known to be finite.
    """

    number: int
    p: Tensor
    piece: Piece
    suffix: str
    state: dict[str, Tensor]
    finite: Tensor | None

    def key(self, name: str) -> str:
        """What the rule calls `name` as the state has it."""
        return name if name in self.state else name + self.suffix

    def in_shape(self, name: str) -> bool:
        """Whether this state has the parameter's shape, all pieces together."""
        return name in self.state and self.state[name].shape == self.p.shape

    def matrices(self, name: str) -> Tensor:
        """State `name` of these blocks as it is stored, (blocks, ...); counters are (1, 1, 1)."""
        t = self.state[self.key(name)]
        if self.in_shape(name):
            return self.piece.of(t)
        if t.ndim == 0:
            return t.view(1, 1, 1)
        if leading(t.shape, self.p.shape) is not None:
            t = t[0]
        return t.unsqueeze(0) if self.piece.blocks[0] == 1 else t

    def place(self, name: str) -> Tensor:
        """A view of state `name` to write to."""
        return self.piece.view(self.state[name]) if self.in_shape(name) else self.matrices(name)

    def seed(self, what: str) -> Tensor:
        """For this step's noise on `what`: the same on every rank and in every rerun, and made on the device."""
        return self.state["step"].to(torch.int64) * SPREAD + self.own(what)

    def own(self, what: str) -> int:
        """What sets this seed apart from other parameters' and other noise, in 32 bits."""
        return (zlib.crc32(f"{what}{self.suffix}".encode()) + self.number * 0x85EBCA6B) % (1 << 32)


def seeds(members: Sequence[Member], what: str) -> Tensor:
    """`Member.seed` of each, (members,)."""
    steps = torch.stack([m.state["step"] for m in members]).to(torch.int64)
    return steps * SPREAD + torch.tensor([m.own(what) for m in members], device=steps.device)
