"""Named optimizers: one small class per file, whose constructor only builds a rule."""

from schatten.presets.muon import Muon

__all__ = ["Muon"]
