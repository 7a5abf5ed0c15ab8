"""Options of every preset: legal values that are drawn, and illegal ones that no optimizer may take, even as something else."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import schatten
from schatten import Layout, compressors, maps, presets, retractions, scales, signals, solvers
from schatten.state import AVERAGES
from tests.fuzz.tensors import Numbers


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
    "max_batch_bytes": (0, -1, 1.5, "1", True),
    "kernels": ("cuda", "", None, 1),
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
    if found.get("workers", 1) > 1:  # whose averages have a shape of their own
        found.pop("state_dtype", None)
    if preset == "SpectralOptimizer":
        rule = found["rule"] = draw(rules())
        found |= {key: draw(st.sampled_from(LEGAL[key])) for key in rule.hyperparameters}
        if isinstance(rule.signal, signals.Gradient):
            found.pop("state_dtype", None)
    return found
