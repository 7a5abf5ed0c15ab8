"""schatten: spectral optimizers for PyTorch, as one rule with one step, and instruments to see what they do.

import schatten
opt = schatten.Muon(model, lr=3e-4, weight_decay=0.1)
print(opt.plan)
"""

from importlib.metadata import version

from schatten import directions, maps, presets, retractions, scales, signals, solvers
from schatten.functions import apply_map, spectral_power
from schatten.optimizer import SpectralOptimizer
from schatten.polar import polar
from schatten.presets import (
    MARSM,
    Fanion,
    FMuon,
    JaguarMuon,
    Lion,
    LionK,
    Muon,
    MuonMVR,
    MuonPlusPlus,
    Neon,
    Scion,
    SimplifiedMuon,
    SMuon,
    SpectralAdam,
    SpectralSGD,
    TrustRegion,
)
from schatten.routing import Plan, plan
from schatten.rule import Rule

__version__ = version("schatten")

__all__ = [
    "MARSM",
    "FMuon",
    "Fanion",
    "JaguarMuon",
    "Lion",
    "LionK",
    "Muon",
    "MuonMVR",
    "MuonPlusPlus",
    "Neon",
    "Plan",
    "Rule",
    "SMuon",
    "Scion",
    "SimplifiedMuon",
    "SpectralAdam",
    "SpectralOptimizer",
    "SpectralSGD",
    "TrustRegion",
    "apply_map",
    "directions",
    "maps",
    "plan",
    "polar",
    "presets",
    "retractions",
    "scales",
    "signals",
    "solvers",
    "spectral_power",
]
