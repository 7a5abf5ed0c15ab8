"""Layouts: how one parameter is read as logical matrices, the blocks that a rule sees.

A layout is a kind, which says which axes are rows, columns and batch, and cuts of one axis: `split` into parts that may
differ in size, `heads` into equal blocks of each part. Everything it does is a view, so a block of a parameter, of its
gradient and of its momentum is read and written in place, and a rule cannot tell it from a parameter of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from itertools import groupby

from torch import Tensor

KINDS = ("auto", "matrix", "conv", "positions", "experts", "flat")

AXES = ("fan_out", "fan_in")


@dataclass(frozen=True, repr=False)
class Layout:
    """How a parameter is read as a batch of matrices (fan_out, fan_in).

    | kind | shape | matrices |
    |---|---|---|
    | `matrix` | (fan_out, fan_in) | itself |
    | `conv` | (out, in, *kernel) | one, out x (in * kernel) |
    | `positions` | (out, in, *kernel) | one out x in for each kernel position |
    | `experts` | (*banks, fan_out, fan_in) | one for each index of the leading axes |
    | `flat` | any | one row, for maps that act on entries or on the whole |
    | `auto` | | `matrix` in two dimensions, `conv` in four or five; in three it must be written |

    Args:
        kind: one of the above.
        split: cut `axis` into parts of these sizes, such as (q, kv, kv), or into that many equal ones.
        heads: cut each part further into so many equal blocks; one number for all parts or one for each.
        axis: what is cut: `"fan_out"` (rows) or `"fan_in"` (columns, as for an output projection). The fan_in of a
            convolution is counted in channels.
        groups: the axis is so many repetitions of the split, as where heads interleave their q, k and v.
        transpose: stored as (fan_in, fan_out), such as Hugging Face's Conv1D; of convolutions the first two dimensions
            are swapped, as in ConvTranspose.

    The law: a parameter with a layout is stepped as its blocks would be if each were a parameter, up to the rounding of
    batched products. Raises ValueError for values that make no layout.

    Example:
        >>> import schatten
        >>> print(schatten.Layout(split=(8, 4, 4), heads=(4, 2, 2)))
        split (8, 4, 4), heads (4, 2, 2)
        >>> [piece.blocks for piece in schatten.layout.pieces(schatten.Layout(split=(8, 4, 4)), (16, 8))]
        [(1, 8, 8), (2, 4, 8)]
    """

    kind: str = "auto"
    _: KW_ONLY
    split: int | tuple[int, ...] = 1
    heads: int | tuple[int, ...] = 1
    axis: str = "fan_out"
    groups: int = 1
    transpose: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, KINDS))} or a Layout, got {self.kind!r}.")
        if self.axis not in AXES:
            raise ValueError(f"axis must be 'fan_out' or 'fan_in', got {self.axis!r}.")
        if not isinstance(self.transpose, bool):
            raise ValueError(f"transpose must be True or False, got {self.transpose!r}.")
        for name in ("split", "heads"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name, value in (("split", self.split), ("heads", self.heads), ("groups", self.groups)):
            numbers = value if isinstance(value, tuple) and name != "groups" else (value,)
            if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
                raise ValueError(f"{name} must be a positive integer{_OR_MANY[name]}, got {value!r}.")
        parts = self.split if isinstance(self.split, int) else len(self.split)
        if isinstance(self.heads, tuple) and len(self.heads) != parts:
            raise ValueError(f"heads must be one number or one for each of the {parts} parts of split, got {self.heads}.")
        if self.kind == "flat" and (self.split, self.heads, self.groups, self.transpose) != (1, 1, 1, False):
            raise ValueError(f"A flat layout is one row, which takes no cuts and no transpose, got {self!r}.")

    def __str__(self) -> str:
        words = [] if self.kind == "auto" else [self.kind]
        words += [f"{name} {getattr(self, name)}" for name in ("split", "heads", "groups") if getattr(self, name) != 1]
        words += [f"on {self.axis}"] * (self.axis != "fan_out") + ["transposed"] * self.transpose
        return ", ".join(words) or "auto"

    def __repr__(self) -> str:
        """Only what differs from the default, so that a checkpoint's text stays the same when options are added."""
        names = ("split", "heads", "axis", "groups", "transpose")
        default = Layout.__dataclass_fields__
        options = [f", {n}={getattr(self, n)!r}" for n in names if getattr(self, n) != default[n].default]
        return f"Layout({self.kind!r}{''.join(options)})"


_OR_MANY = {"split": " or a tuple of them", "heads": " or a tuple of them", "groups": ""}


@dataclass(frozen=True)
class Piece:
    """Equal blocks of a parameter of `shape`: `blocks` is (blocks, fan_out, fan_in).

    They are `parts` parts of `size` along the layout's axis from `offset` on, each cut into `heads`, of every one of the
    `groups` repetitions. A `plain` piece is the whole parameter in its own order, so that reshaping reads it.
    """

    blocks: tuple[int, int, int]
    shape: tuple[int, ...]
    layout: Layout
    offset: int
    parts: int
    size: int
    heads: int
    plain: bool

    def view(self, t: Tensor) -> Tensor:
        """A view of `t`, of the parameter's shape, whose dimensions are those of blocks, rows and columns in turn."""
        t, lead = rows_and_columns(t, self.layout)
        if self.plain:
            return t
        at = lead + AXES.index(self.layout.axis)
        groups, heads = self.layout.groups, self.heads
        t = t.unflatten(at, (groups, t.shape[at] // groups)).narrow(at + 1, self.offset, self.parts * self.size)
        t = t.unflatten(at + 1, (self.parts, self.size))
        if groups % heads == 0:
            # (heads, groups / heads, parts, size)
            t = t.unflatten(at, (heads, groups // heads))
            blocks, kept = [at + 2, at], [at + 1, at + 3]
        else:
            # (groups, parts, heads / groups, size of a head)
            own = heads // groups
            t = t.unflatten(at + 2, (own, self.size // own))
            blocks, kept = [at + 1, at, at + 2], [at + 3]
        others = [d for d in range(t.ndim) if d not in {*blocks, *kept}]
        before = [d for d in others if lead <= d < at]
        return t.permute(*range(lead), *blocks, *before, *kept, *(d for d in others if d > at))

    def of(self, t: Tensor) -> Tensor:
        """The blocks of `t`, (blocks, fan_out, fan_in); a view where memory allows it."""
        return t.reshape(self.blocks) if self.plain else self.view(t).reshape(self.blocks)


def resolve(layout: str | Layout, shape: tuple[int, ...], name: str) -> str | Layout:
    """The layout that `"auto"` stands for, its kind's name if it has no options, after checking that `shape` fits it.

    Raises ValueError that names the parameter: for fewer than two dimensions, for three where the kind must be written,
    for sizes that do not add up to the axis and heads that do not divide a part.
    """
    found = _resolved(layout, shape, name)
    _pieces(found, shape, name)
    return found.kind if found == Layout(found.kind) else found


def pieces(layout: str | Layout, shape: Sequence[int], name: str = "a parameter") -> tuple[Piece, ...]:
    """The blocks that a parameter of `shape` has under `layout`: one piece for each run of equal parts.

    Raises ValueError as `resolve`.
    """
    return _pieces(layout, tuple(shape), name)


# A step asks for the same few again and again.
@lru_cache(maxsize=4096)
def _pieces(layout: str | Layout, shape: tuple[int, ...], name: str) -> tuple[Piece, ...]:
    layout = _resolved(layout, shape, name)
    lead, fan_out, fan_in, length, kernel = _sizes(layout, shape)
    sizes = _parts(layout, length, shape, name)
    heads = layout.heads if isinstance(layout.heads, tuple) else (layout.heads,) * len(sizes)
    plain = layout.kind != "positions" and layout == Layout(layout.kind)
    found, offset = [], 0
    for (size, number), run in groupby(zip(sizes, heads, strict=True)):
        parts = len(list(run))
        if (rows := size * layout.groups) % number or (layout.groups % number and number % layout.groups):
            raise ValueError(
                f"heads must cut a part of {layout.axis} into equal blocks, but {name} of shape {shape} has a part of "
                f"{rows} there and heads={number}" + (f" with groups={layout.groups}." if layout.groups > 1 else ".")
            )
        cut = (lead * parts * number, fan_out, fan_in)
        share = size * layout.groups // number
        blocks = (cut[0], share, fan_in) if layout.axis == "fan_out" else (cut[0], fan_out, share * kernel)
        found.append(Piece(blocks, shape, layout, offset, parts, size, number, plain))
        offset += parts * size
    return tuple(found)


def _resolved(layout: str | Layout, shape: tuple[int, ...], name: str) -> Layout:
    if not isinstance(layout, Layout):
        layout = Layout(layout)
    if layout.kind == "flat":
        return layout
    if len(shape) < 2:
        raise ValueError(
            f"A spectral rule needs matrices, but {name} has shape {shape}. Pass the model itself, which routes "
            f"such parameters to AdamW, or put it into a group with algorithm='adamw'."
        )
    if layout.kind == "auto":
        if len(shape) == 3:
            raise ValueError(
                f"{name} of shape {shape} may be a 1-D convolution or a bank of matrices: put it into a group "
                f"with layout='conv' or layout='experts'."
            )
        layout = replace(layout, kind="matrix" if len(shape) == 2 else "conv")
    if layout.kind == "matrix" and len(shape) != 2:
        raise ValueError(f"layout 'matrix' needs two dimensions, but {name} has shape {shape}; try 'conv' or 'experts'.")
    return layout


def rows_and_columns(t: Tensor, layout: Layout) -> tuple[Tensor, int]:
    """A view of `t` with dimensions (*lead, fan_out, fan_in, *kernel), and the number of leading ones."""
    match layout.kind:
        case "flat":
            return (t.view(1, 1) if t.ndim == 0 else t.unsqueeze(0)), 0
        case "experts":
            lead = t.ndim - 2
        case "positions":
            lead = t.ndim - 2
            t = t.permute(*range(2, t.ndim), 0, 1)
        case _:
            lead = 0
    return (t.transpose(lead, lead + 1) if layout.transpose else t), lead


def _sizes(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """(leading blocks, fan_out, fan_in, length of the axis that is cut, columns of one channel)."""
    match layout.kind:
        case "flat":
            return 1, 1, math.prod(shape), 1, 1
        case "experts":
            lead, (out, into), kernel = math.prod(shape[:-2]), shape[-2:], 1
        case "positions":
            (out, into), lead, kernel = shape[:2], math.prod(shape[2:]), 1
        case _:
            (out, into), lead, kernel = shape[:2], 1, math.prod(shape[2:])
    if layout.transpose:
        out, into = into, out
    return lead, out, into * kernel, out if layout.axis == "fan_out" else into, kernel


def _parts(layout: Layout, length: int, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    repeated = f" in {layout.groups} groups" if layout.groups > 1 else ""
    if isinstance(layout.split, tuple):
        if (total := sum(layout.split) * layout.groups) != length:
            raise ValueError(
                f"split must add up to {layout.axis}, but {name} of shape {shape} has {length} there and "
                f"split={layout.split} adds up to {total}{repeated}."
            )
        return layout.split
    if length % (layout.split * layout.groups):
        raise ValueError(
            f"split must cut {layout.axis} into equal parts, but {name} of shape {shape} has {length} there and "
            f"split={layout.split}{repeated}."
        )
    return (length // (layout.split * layout.groups),) * layout.split
