"""Convex maps K: what a rule does to its signal.

A map is a frozen dataclass with four verbs on matrices `(*b, m, n)`: `value` is K, `grad` its (sub)gradient, the
direction of a step; `conjugate` is K*, and `violation` the distance from K*'s domain, 0 inside. Decoupled weight decay
makes a rule minimise F(W) + (1/weight_decay) K*(weight_decay W); `describe` says which problem that is.

Most are potentials of magnitudes: of the singular values by default, or of entries, rows, columns or the whole matrix
with `over=` (`schatten.maps.lifts`). `c * map` and `map + map` are maps.
"""

from schatten.maps.clip import Clip
from schatten.maps.combinations import Scaled, Sum
from schatten.maps.core import Map
from schatten.maps.frobenius import Frobenius
from schatten.maps.half_nuclear_squared import HalfNuclearSquared
from schatten.maps.hard_gate import HardGate
from schatten.maps.huber import Huber
from schatten.maps.ky_fan import KyFan
from schatten.maps.l1 import L1
from schatten.maps.log_cosh import LogCosh
from schatten.maps.log_smoothed import LogSmoothed
from schatten.maps.nuclear import Nuclear
from schatten.maps.ordered import Ordered
from schatten.maps.power import Power
from schatten.maps.pseudo_huber import PseudoHuber
from schatten.maps.schatten_norm import Schatten
from schatten.maps.soft_threshold import SoftThreshold

__all__ = [
    "L1",
    "Clip",
    "Frobenius",
    "HalfNuclearSquared",
    "HardGate",
    "Huber",
    "KyFan",
    "LogCosh",
    "LogSmoothed",
    "Map",
    "Nuclear",
    "Ordered",
    "Power",
    "PseudoHuber",
    "Scaled",
    "Schatten",
    "SoftThreshold",
    "Sum",
]
