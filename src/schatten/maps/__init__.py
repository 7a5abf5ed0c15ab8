"""Convex maps K: what a rule does to its signal.

A map is a frozen dataclass with four verbs on matrices `(*b, m, n)`: `value` is K, `grad` its (sub)gradient, the
direction of a step; `conjugate` is K*, and `violation` the distance from K*'s domain, 0 inside. Decoupled weight decay
makes a rule minimise F(W) + (1/weight_decay) K*(weight_decay W).
"""

from schatten.maps.core import Map
from schatten.maps.nuclear import Nuclear

__all__ = ["Map", "Nuclear"]
