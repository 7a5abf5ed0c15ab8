"""Named optimizers: one small class per file, whose constructor only builds a rule."""

from schatten.presets.adamuon import AdaMuon
from schatten.presets.dion import Dion
from schatten.presets.dion2 import Dion2
from schatten.presets.ef21_muon import EF21Muon
from schatten.presets.f_muon import FMuon
from schatten.presets.fanion import Fanion
from schatten.presets.hyperball import Hyperball
from schatten.presets.jaguar_muon import JaguarMuon
from schatten.presets.kl_soap import KLSOAP
from schatten.presets.lion import Lion
from schatten.presets.lion_k import LionK
from schatten.presets.mars_m import MARSM
from schatten.presets.muon import Muon
from schatten.presets.muon_eq import MuonEq
from schatten.presets.muon_mvr import MuonMVR
from schatten.presets.muon_plus import MuonPlus
from schatten.presets.muon_plus_plus import MuonPlusPlus
from schatten.presets.neon import Neon
from schatten.presets.normuon import NorMuon
from schatten.presets.polar_grad import PolarGrad
from schatten.presets.s_muon import SMuon
from schatten.presets.scion import Scion
from schatten.presets.simplified_muon import SimplifiedMuon
from schatten.presets.soap_muon import SOAPMuon
from schatten.presets.spectral_adam import SpectralAdam
from schatten.presets.spectral_sgd import SpectralSGD
from schatten.presets.trust_region import TrustRegion

__all__ = [
    "KLSOAP",
    "MARSM",
    "AdaMuon",
    "Dion",
    "Dion2",
    "EF21Muon",
    "FMuon",
    "Fanion",
    "Hyperball",
    "JaguarMuon",
    "Lion",
    "LionK",
    "Muon",
    "MuonEq",
    "MuonMVR",
    "MuonPlus",
    "MuonPlusPlus",
    "Neon",
    "NorMuon",
    "PolarGrad",
    "SMuon",
    "SOAPMuon",
    "Scion",
    "SimplifiedMuon",
    "SpectralAdam",
    "SpectralSGD",
    "TrustRegion",
]
