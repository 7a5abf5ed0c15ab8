"""Retractions: how a direction reaches the weight, as frozen dataclasses (`schatten.retractions.core`)."""

from schatten.retractions.cautious_decay import CautiousDecay
from schatten.retractions.composite_step import CompositeStep
from schatten.retractions.core import Retraction
from schatten.retractions.decoupled_decay import DecoupledDecay
from schatten.retractions.fixed_norm import FixedNorm
from schatten.retractions.named import decays_explicitly, named
from schatten.retractions.server_compression import ServerCompression
from schatten.retractions.tied_decay import TiedDecay
from schatten.retractions.update_floor import UpdateFloor

__all__ = [
    "CautiousDecay",
    "CompositeStep",
    "DecoupledDecay",
    "FixedNorm",
    "Retraction",
    "ServerCompression",
    "TiedDecay",
    "UpdateFloor",
    "decays_explicitly",
    "named",
]
