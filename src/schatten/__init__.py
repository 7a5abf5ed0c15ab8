"""schatten: spectral optimizers for PyTorch, as one rule with one step, and instruments to see what they do.

import schatten
opt = schatten.Muon(model, lr=3e-4, weight_decay=0.1)
print(opt.plan)
"""

from importlib.metadata import version

from schatten import (
    compressors,
    converters,
    diagnostics,
    directions,
    maps,
    presets,
    retractions,
    scales,
    schedules,
    signals,
    solvers,
)
from schatten.checkpoint_file import load, save
from schatten.clip import clip_grad_norm_
from schatten.convert_lr import convert_lr, convert_weight_decay
from schatten.ema_nesterov import EMANesterov
from schatten.functions import apply_map, spectral_power
from schatten.initialise import init_spectral_
from schatten.layout import Layout
from schatten.monitor import Monitor
from schatten.optimizer import SpectralOptimizer
from schatten.polar import polar
from schatten.presets import (
    KLSOAP,
    MARSM,
    AdaMuon,
    Dion,
    Dion2,
    EF21Muon,
    Fanion,
    FMuon,
    Hyperball,
    JaguarMuon,
    Lion,
    LionK,
    Muon,
    MuonEq,
    MuonMVR,
    MuonPlus,
    MuonPlusPlus,
    Neon,
    NorMuon,
    PolarGrad,
    Scion,
    SimplifiedMuon,
    SMuon,
    SOAPMuon,
    SpectralAdam,
    SpectralSGD,
    TrustRegion,
)
from schatten.qk_clip import qk_clip_
from schatten.routing import Plan, plan
from schatten.rule import Rule

__version__ = version("schatten")

__all__ = [
    "KLSOAP",
    "MARSM",
    "AdaMuon",
    "Dion",
    "Dion2",
    "EF21Muon",
    "EMANesterov",
    "FMuon",
    "Fanion",
    "Hyperball",
    "JaguarMuon",
    "Layout",
    "Lion",
    "LionK",
    "Monitor",
    "Muon",
    "MuonEq",
    "MuonMVR",
    "MuonPlus",
    "MuonPlusPlus",
    "Neon",
    "NorMuon",
    "Plan",
    "PolarGrad",
    "Rule",
    "SMuon",
    "SOAPMuon",
    "Scion",
    "SimplifiedMuon",
    "SpectralAdam",
    "SpectralOptimizer",
    "SpectralSGD",
    "TrustRegion",
    "apply_map",
    "clip_grad_norm_",
    "compressors",
    "convert_lr",
    "convert_weight_decay",
    "converters",
    "diagnostics",
    "directions",
    "init_spectral_",
    "load",
    "maps",
    "plan",
    "polar",
    "presets",
    "qk_clip_",
    "retractions",
    "save",
    "scales",
    "schedules",
    "signals",
    "solvers",
    "spectral_power",
]
