"""Named optimizers: one small class per file, whose constructor only builds a rule."""

from schatten.presets.f_muon import FMuon
from schatten.presets.fanion import Fanion
from schatten.presets.jaguar_muon import JaguarMuon
from schatten.presets.lion import Lion
from schatten.presets.lion_k import LionK
from schatten.presets.mars_m import MARSM
from schatten.presets.muon import Muon
from schatten.presets.muon_mvr import MuonMVR
from schatten.presets.muon_plus_plus import MuonPlusPlus
from schatten.presets.neon import Neon
from schatten.presets.s_muon import SMuon
from schatten.presets.scion import Scion
from schatten.presets.simplified_muon import SimplifiedMuon
from schatten.presets.spectral_adam import SpectralAdam
from schatten.presets.spectral_sgd import SpectralSGD
from schatten.presets.trust_region import TrustRegion

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
    "SMuon",
    "Scion",
    "SimplifiedMuon",
    "SpectralAdam",
    "SpectralSGD",
    "TrustRegion",
]
