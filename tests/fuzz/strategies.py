"""What the fuzz draws: layouts with shapes that fit them, and whole optimizers with their gradients.

Everything drawn is a frozen description that prints as the call that makes it, so a failing case can be pasted into a file;
`make` and `build` give the same bits each time they are called.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from torch import nn

from schatten import Layout, presets
from tests.fuzz.options import made, optimizer, options, options_of
from tests.fuzz.tensors import DTYPES, GRADIENTS, NON_FINITE, ORDINARY, STRIDES, Numbers, numbers

# -- shapes and layouts ----------------------------------------------------------------------------------------------------

SIZES = st.sampled_from((1, 2, 3, 4, 6, 0))


def shapes(least: int = 0, most: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Empty, 1 x n, square, tall and wide; longer ones in two dimensions only, so that a case stays cheap."""
    long = st.sampled_from(((1, 36), (19, 1), (12, 3), (2, 16)))
    short = st.lists(SIZES, min_size=least, max_size=most).map(tuple).filter(lambda shape: math.prod(shape) <= 400)
    return st.one_of(short, long) if least <= 2 <= most else short


@dataclass(frozen=True)
class Read:
    """A layout with shapes that it fits."""

    layout: str | Layout
    shapes: tuple[tuple[int, ...], ...]


@st.composite
def fitting(draw) -> Read:
    """Layouts of every kind, and shapes built to have the rows and columns that they cut."""
    kind = draw(st.sampled_from(("auto", "matrix", "conv", "positions", "experts", "flat")))
    count = draw(st.integers(1, 3))
    if kind == "flat":
        return Read("flat", tuple(draw(shapes()) for _ in range(count)))
    options = draw(cuts()) if draw(st.booleans()) else {}
    layout = Layout(kind, **options)
    found = []
    for _ in range(count):
        if found and draw(st.booleans()):
            found.append(found[-1])
            continue
        length = cut_length(options, draw(st.integers(1, 2)))
        other = draw(SIZES)
        ndim = draw(st.sampled_from({"matrix": (2,), "auto": (2, 4, 5)}.get(kind, (2, 3, 4, 5))))
        rest = tuple(draw(st.sampled_from((1, 2, 3))) for _ in range(ndim - 2))
        out, into = (length, other) if layout.axis == "fan_out" else (other, length)
        pair = (into, out) if layout.transpose else (out, into)
        found.append((*rest, *pair) if kind == "experts" else (*pair, *rest))
    return Read(kind if layout == Layout(kind) else layout, tuple(found))


@st.composite
def cuts(draw) -> dict[str, Any]:
    """Options of a layout: heads divide their part of all groups, and the groups or a multiple of them."""
    options: dict[str, Any] = {"axis": draw(st.sampled_from(("fan_out", "fan_in"))), "transpose": draw(st.booleans())}
    groups = options["groups"] = draw(st.sampled_from((1, 2, 3)))
    if draw(st.booleans()):
        options["split"] = draw(st.sampled_from((1, 2, 3)))
        options["heads"] = draw(st.sampled_from((1, groups, 2 * groups)))
    else:
        sizes = options["split"] = tuple(draw(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3)))
        options["heads"] = tuple(groups * draw(st.sampled_from([h for h in (1, 2) if size % h == 0])) for size in sizes)
    return options


def cut_length(options: Mapping[str, Any], unit: int) -> int:
    """A length that these cuts divide."""
    split, heads, groups = options.get("split", 1), options.get("heads", 1), options.get("groups", 1)
    if isinstance(split, tuple):
        return sum(split) * groups
    return split * groups * unit * (heads // groups if heads > groups else 1)


ANY_LAYOUT = st.one_of(
    st.sampled_from(("auto", "matrix", "conv", "positions", "experts", "flat")),
    st.builds(
        Layout,
        st.sampled_from(("auto", "matrix", "conv", "positions", "experts")),
        split=st.one_of(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)),
        heads=st.integers(1, 4),
        axis=st.sampled_from(("fan_out", "fan_in")),
        groups=st.integers(1, 3),
        transpose=st.booleans(),
    ),
)


# Rules whose steps grow with the gradient: one of 1e30 takes a weight of half precision out of its range, as SGD's would.
GROWING = ("PolarGrad", "SimplifiedMuon", "SpectralSGD", "LionK", "TrustRegion", "SpectralOptimizer")
SMALL = ("normal", "zeros", "constant", "rank one", "sparse", "1e-30", "denormal")


# -- optimizers ------------------------------------------------------------------------------------------------------------

PRESETS = (*presets.__all__, "SpectralOptimizer", "Muon")


@dataclass(frozen=True)
class Group:
    """Parameters with the options of their group; parameter i of group g is called `wg.i`."""

    params: tuple[Numbers, ...]
    algorithm: str = "spectral"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """An optimizer: a preset, its options and its groups."""

    preset: str
    groups: tuple[Group, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[nn.Parameter]:
        return [parameter(n) for group in self.groups for n in group.params]

    def names(self) -> list[str]:
        return [f"w{g}.{i}" for g, group in enumerate(self.groups) for i in range(len(group.params))]

    def build(self, tensors: list[nn.Parameter] | None = None) -> Any:
        """The optimizer, of new parameters or the given ones."""
        left = list(zip(self.names(), self.tensors() if tensors is None else tensors, strict=True))
        groups = []
        for group in self.groups:
            own, left = left[: len(group.params)], left[len(group.params) :]
            groups.append({"params": own, "algorithm": group.algorithm, **made(group.options)})
        return optimizer(self.preset)(groups, **made(self.options))


def parameter(n: Numbers) -> nn.Parameter:
    t = n.make()
    return nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex())


GROUP_OPTIONS = ("lr", "weight_decay", "rounding", "maximize")


@st.composite
def setups(draw, weights: tuple[str, ...] = ORDINARY) -> Setup:
    """Optimizers that must be accepted."""
    preset = draw(st.sampled_from(PRESETS))
    groups = []
    for _ in range(draw(st.integers(1, 2))):
        read = draw(fitting())
        dtype = draw(st.sampled_from(DTYPES))
        own: dict[str, Any] = {"layout": read.layout}
        known = options_of(preset)
        for key in draw(st.lists(st.sampled_from(GROUP_OPTIONS), max_size=1)):
            if key in known:
                own[key] = draw(st.sampled_from(known[key]))
        groups.append(Group(tuple(draw(numbers(s, dtype, weights)) for s in read.shapes), "spectral", own))
    if preset != "JaguarMuon" and draw(st.booleans()):  # which has no gradients for AdamW
        dtype = draw(st.sampled_from(DTYPES))
        params = tuple(draw(numbers(draw(shapes()), dtype, weights)) for _ in range(draw(st.integers(1, 2))))
        groups.append(Group(params, "adamw"))
    return Setup(preset, tuple(groups), draw(options(preset)))


@st.composite
def gradients(draw, setup: Setup, steps: int):
    """For each step, for each parameter its gradient or None."""
    values = (*(SMALL if setup.preset in GROWING else GRADIENTS), *NON_FINITE)
    return tuple(
        tuple(
            draw(numbers(n.shape, n.dtype, values, (*STRIDES, "expanded"))) if draw(st.integers(0, 7)) else None
            for group in setup.groups
            for n in group.params
        )
        for _ in range(steps)
    )
