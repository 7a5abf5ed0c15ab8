"""schatten: spectral optimizers for PyTorch, as one rule with one step, and instruments to see what they do.

import schatten
opt = schatten.Muon(model, lr=3e-4, weight_decay=0.1)
print(opt.plan)
"""

from importlib.metadata import version

from schatten import maps, presets, retractions, scales, signals, solvers
from schatten.functions import apply_map, spectral_power
from schatten.optimizer import SpectralOptimizer
from schatten.polar import polar
from schatten.presets import Muon
from schatten.routing import Plan, plan
from schatten.rule import Rule

__version__ = version("schatten")

__all__ = [
    "Muon",
    "Plan",
    "Rule",
    "SpectralOptimizer",
    "apply_map",
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
