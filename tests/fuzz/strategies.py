"""What the fuzz draws: tensors in words, layouts that fit them, options, and whole optimizers with their gradients.

Everything drawn is a frozen description that prints as the call that makes it, so a failing case can be pasted into a file;
`make` and `build` give the same bits each time they are called.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import schatten
from schatten import Layout, compressors, maps, presets, retractions, scales, signals, solvers
from schatten.state import AVERAGES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED_DTYPES = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)

ORDINARY = ("normal", "zeros", "constant", "rank one", "sparse", "1e-30", "denormal", "mixed", "1e30")
EXTREME = ("1e38", "largest", "alternating")
GRADIENTS = (*ORDINARY, *EXTREME)
NON_FINITE = ("an inf", "a -inf", "a nan", "all nan")

STRIDES = ("dense", "transposed", "sliced", "offset", "permuted", "channels last")


@dataclass(frozen=True)
class Numbers:
    """A tensor in words."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    strides: str = "dense"
    seed: int = 0

    def make(self) -> Tensor:
        return laid_out(entries(self), self.strides)


def entries(n: Numbers) -> Tensor:
    generator = torch.Generator().manual_seed(n.seed)
    X = torch.randn(n.shape, generator=generator, dtype=torch.float64)
    if not n.dtype.is_floating_point:
        return X.mul(3).to(n.dtype)
    info = torch.finfo(n.dtype)
    match n.values:
        case "zeros":
            X = torch.zeros_like(X)
        case "constant":
            X = torch.full_like(X, 0.75)
        case "rank one" if X.ndim > 1:
            X = X[..., :1] * X[..., :1, :]
        case "sparse":
            X = X * (X > 0.5)
        case "1e-30" | "1e30" | "1e38":
            X = X * float(n.values)
        case "denormal":
            X = X.clamp(-1, 1) * info.smallest_normal / 2
        case "mixed":
            X = X * 10.0 ** torch.randint(-30, 31, n.shape, generator=generator)
        case "largest":
            X = X.sign() * info.max
        case "alternating":
            X = torch.full_like(X, info.max * (-1) ** n.seed)
    # All but the extreme kinds leave room for what a step adds to a weight.
    most = info.max if n.values in EXTREME else info.max / 1024
    X = X.clamp(-most, most).to(n.dtype)
    if n.values in NON_FINITE and X.numel():
        bad = float(n.values.split()[-1])
        if n.values.startswith("all"):
            X.fill_(bad)
        else:
            X.view(-1)[n.seed % X.numel()] = bad
    return X


def laid_out(t: Tensor, strides: str) -> Tensor:
    """The values of `t` in another order in memory, where its number of dimensions has such an order."""
    match strides:
        case "transposed" if t.ndim > 1:
            return t.mT.contiguous().mT
        case "sliced" if t.ndim > 0:
            return torch.stack([t, torch.ones_like(t)], -1).flatten(-2)[..., ::2]
        case "offset":
            return torch.cat([t.new_ones(3), t.reshape(-1)])[3:].view(t.shape)
        case "permuted" if t.ndim > 1:
            axes = tuple(reversed(range(t.ndim)))
            return t.permute(axes).contiguous().permute(axes)
        case "channels last" if t.ndim in (4, 5):
            return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)
        case "expanded" if t.ndim > 0 and t.numel():
            return t[:1].expand(t.shape)
    return t


SEEDS = st.integers(0, 9)


@st.composite
def numbers(draw, shape: tuple[int, ...], dtype: torch.dtype, values: tuple[str, ...], strides: tuple[str, ...] = STRIDES):
    return Numbers(shape, dtype, draw(st.sampled_from(values)), draw(st.sampled_from(strides)), draw(SEEDS))


# -- shapes and layouts ----------------------------------------------------------------------------------------------------

SIZES = st.sampled_from((1, 2, 3, 4, 6, 0))


def shapes(least: int = 0, most: int = 5) -> st.SearchStrategy[tuple[int, ...]]:
    """Empty, 1 x n, square, tall and wide; longer ones in two dimensions only, so that a case stays cheap."""
    long = st.sampled_from(((1, 17), (19, 1), (12, 3), (2, 16)))
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


# -- options ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """A one-element tensor as an option, made anew for each optimizer."""

    value: float
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def make(self) -> Tensor:
        return torch.full(self.shape, self.value, dtype=self.dtype)


def made(value: Any) -> Any:
    """An option as an optimizer takes it."""
    if isinstance(value, Mapping):
        return {key: made(v) for key, v in value.items()}
    return value.make() if isinstance(value, (One, Numbers)) else value


SOLVERS = (solvers.polynomial(), solvers.svd(), solvers.newton_schulz(), solvers.gram(), solvers.polynomial(steps=2))

MAPS = (
    maps.Nuclear(),
    maps.L1(),
    maps.Frobenius(),
    maps.Power(0.5),
    maps.Power(1.0, over="entries"),
    maps.Schatten(3.0),
    maps.KyFan(2),
    maps.Huber(0.1),
    maps.Clip(0.5, "spectral"),
    maps.SoftThreshold(0.1),
    maps.HardGate(0.1),
    maps.PseudoHuber(0.1),
    maps.LogCosh(0.1),
    maps.LogSmoothed(0.1),
    maps.HalfNuclearSquared(),
    maps.Ordered((1.0, 0.5)),
    0.5 * maps.Nuclear() + 0.5 * maps.L1(),
)

COMPRESSORS = (compressors.Identity(), compressors.TopK(0.3), compressors.RankK(2), compressors.Natural(), compressors.Sign())

# Learning rates and decays up to 1 each: lr lambda > 1 is warned of, and what a larger lr adds to a half-precision weight
# may leave its range, which is what was asked for.
LEGAL: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 0.0, 1e-8, 1.0, 1, One(0.1), One(0.1, (1,)), One(0.5, (), torch.float64)),
    "weight_decay": (0.1, 0.0, 1.0, 0, One(0.1)),
    "momentum": (0.95, 0.0, 0.5, 0.999, 0),
    "betas": ((0.9, 0.99), (0.0, 0.0), [0.9, 0.95], (0.999, 0.9)),
    "beta2": (0.95, 0.0, 0.9999),
    "nesterov": (True, False),
    "scale": ("adamw-rms", "keller", "mup", "none"),
    "solver": (None, *SOLVERS),
    "decay": ("explicit", "implicit", "cautious", retractions.UpdateFloor(), retractions.TiedDecay(), retractions.FixedNorm()),
    "rounding": ("stochastic", "kahan", "nearest"),
    "state_dtype": (None, "bfloat16", "int8"),
    "maximize": (False, True),
    "max_batch_bytes": (1 << 20, 1, 1000),
    "gamma": (0.025, 0.0, 1.0),
    "clip": (True, False),
    "exact": (False, True),
    "rank": (0.25, 1.0, 0.01),
    "variant": ("dion", "orth"),
    "fraction": (0.25, 1.0),
    "compressor": (None, *COMPRESSORS),
    "server_compressor": (None, *COMPRESSORS),
    "workers": (1, 2),
    "alpha": (0.5, 0.1),
    "count": (1, 2, 5),
    "share": (0.1, 1.0),
    "map": (None, *MAPS),
    "eta_s": (0.003,),
    "radius": (50.0, 1.0),
    "sign_radius": (3000.0, 1.0),
    "constrained": (True, False),
    "adaptive": (True, False),
    "p": (0.5, 0.0, 1.0, 0.25),
    "normalize": (None,),
    "penalty": (None, 0.01 * maps.Nuclear(), 0.01 * maps.L1()),
    "iterations": (2, 5),
    "shampoo_beta": (0.9, 0.0),
    "max_dim": (8192, 3, 0),
    "statistics": ("kl", "gram"),
    "eps": (1e-8, 1e-6),
    "rule": (),
}

# Of one name and another meaning.
LEGAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    "Muon": {"form": ("ema", "sum")},
    "LionK": {"form": ("paper", "site")},
    "MuonEq": {"form": ("rows", "columns", "both")},
    "MuonPlus": {"norm": ("row", "col", "col_row", "row_col")},
    "TrustRegion": {"norm": (None, maps.Nuclear(), maps.L1(), maps.Frobenius())},
    "JaguarMuon": {"eps": (1e-3, 0.1)},
    "SpectralSGD": {"p": (0.0, 0.5, 1.0), "solver": (None, solvers.svd())},
    "SpectralAdam": {"p": (0.5, 0.0, 1.0), "solver": (None, solvers.svd())},
    "Hyperball": {"weight_decay": (0.0,)},
    "Scion": {"lr": (0.01, 0.0, 1e-8, One(0.001))},
}

NAN = float("nan")

# Values that no optimizer may take, not even silently as something else.
ILLEGAL: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, NAN, math.inf, 10**400, "0.1", None, 1j, [0.1], One(NAN), One(-1.0), One(0.1, (2,))),
    "weight_decay": (-0.1, NAN, math.inf, "0.1", None, 1j, [0.1], One(NAN), One(0.1, (2,))),
    "momentum": (1.0, -0.1, NAN, "0.9", None, (0.9,), 1j),
    "betas": ((0.9,), (0.9, 1.0), 0.9, "ab", None, (None, 0.9), ("a", "b"), (0.9, NAN)),
    "beta2": (1.0, NAN, "0.9", None),
    "rounding": ("up", None, 3, ["kahan"]),
    "state_dtype": ("float8", 3, ["int8"]),
    "layout": ("linear", None, 3, ("matrix",), Layout),
    "maximize": ("no", None, 2),
    "nesterov": ("no", None, 2),
    "scale": ("spectral", "x", None, 3),
    "decay": ("l2", None, 3, retractions.FixedNorm),
    "solver": ("svd", 3, solvers.svd),
    "max_batch_bytes": (0, -1, 1.5, "1", None, True),
    "adamw": (3, "x", {"betas": (0.9,)}, {"lr": NAN}, {"eps": -1.0}, {"eps": "x"}),
    "rules": ([("*", "spectral")],),
    "rule": (3, "Muon", schatten.Rule),
    "gamma": (2.0, NAN, "x", None),
    "clip": ("no", None),
    "exact": ("no", None),
    "rank": (0, 2.0, NAN, "x", None),
    "variant": ("x", None),
    "fraction": (0, 1.5, NAN, "x", None),
    "compressor": (3, "topk", compressors.TopK),
    "server_compressor": (3, "topk", compressors.TopK),
    "workers": (0, 1.5, "2", None),
    "alpha": (-1, NAN, "x", None),
    "count": (0, 1.5, "x", None),
    "share": (0, 2, NAN, "x", None),
    "map": (3, "nuclear", maps.Nuclear),
    "eta_s": (-1.0, NAN, "x", None),
    "radius": (-1.0, NAN, "x", None),
    "sign_radius": (-1.0, NAN, "x", None),
    "constrained": ("no", None),
    "adaptive": ("no", None),
    "p": (NAN, "x", None, 5.0),
    "normalize": ("x", 3),
    "penalty": (3, "x", maps.Huber(0.1)),
    "iterations": (0, 1.5, "x", None),
    "shampoo_beta": (1.0, NAN, "x", None),
    "max_dim": (-1, 1.5, "x", None),
    "statistics": ("x", None),
    "eps": (-1.0, NAN, "x", None),
    "form": ("x", None, 3),
    "norm": ("x", 3),
}

SIGNALS = (
    signals.Momentum(),
    signals.Momentum("sum", nesterov=False),
    signals.Gradient(),
    signals.TwoBeta(),
    signals.AdamRatio(),
    signals.VarianceReduced(),
)
RETRACTIONS = (
    retractions.DecoupledDecay(),
    retractions.DecoupledDecay("implicit"),
    retractions.CautiousDecay(),
    retractions.FixedNorm(),
    retractions.UpdateFloor(over="rows"),
    retractions.ServerCompression(compressor=compressors.TopK(0.5)),
)
FACTORS = (scales.Scale(), scales.Scale("keller"), scales.RMS(0.2))


@cache
def accepted(preset: str) -> frozenset[str]:
    """Every option that a preset's constructor takes."""
    own = inspect.signature(optimizer(preset).__init__).parameters
    names = set(own)
    if any(p.kind is p.VAR_KEYWORD for p in own.values()) and preset != "SpectralOptimizer":
        names |= set(inspect.signature(schatten.SpectralOptimizer.__init__).parameters) - {"rule"}
    return frozenset(names)


@cache
def options_of(preset: str) -> dict[str, tuple[Any, ...]]:
    """Every option of a preset that is drawn, with its legal values."""
    values = {**LEGAL, **LEGAL_OF.get(preset, {})}
    known = {name: values[name] for name in values if name in accepted(preset) and values[name]}
    if preset == "Scion":  # has its own words for decay
        del known["weight_decay"]
    if preset in presets.__all__ and not _has_averages(optimizer(preset)):
        known.pop("state_dtype", None)
    return known


def _has_averages(kind: Any) -> bool:
    opt = kind([nn.Parameter(torch.ones(2, 2))])
    return any(set(AVERAGES) & set(state) for state in opt.state.values())


def optimizer(preset: str) -> Any:
    return getattr(schatten, preset)


@st.composite
def rules(draw) -> schatten.Rule:
    parts = (SIGNALS, MAPS, FACTORS, RETRACTIONS)
    return schatten.Rule(*(draw(st.sampled_from(part)) for part in parts))


@st.composite
def options(draw, preset: str) -> dict[str, Any]:
    """A few legal options: all others keep their defaults, so that most are drawn beside them."""
    known = options_of(preset)
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=4, unique=True))
    found = {name: draw(st.sampled_from(known[name])) for name in chosen}
    if preset == "SpectralOptimizer":
        rule = found["rule"] = draw(rules())
        found |= {key: draw(st.sampled_from(LEGAL[key])) for key in rule.hyperparameters}
        if isinstance(rule.signal, signals.Gradient):
            found.pop("state_dtype", None)
    return found


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
    if preset != "JaguarMuon" and draw(st.booleans()):
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
