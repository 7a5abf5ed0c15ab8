"""Named optimizers: one small class per file, whose constructor only builds a rule."""

from schatten.presets.muon import Muon
from schatten.presets.spectral_adam import SpectralAdam
from schatten.presets.spectral_sgd import SpectralSGD

__all__ = ["Muon", "SpectralAdam", "SpectralSGD"]
