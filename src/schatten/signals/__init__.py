"""Signals: what a rule makes of its gradients before the map sees them, as frozen dataclasses (`schatten.signals.core`)."""

from schatten.signals.adam_ratio import AdamRatio
from schatten.signals.core import Signal, State
from schatten.signals.error_feedback import ErrorFeedback
from schatten.signals.gradient import Gradient
from schatten.signals.momentum import Momentum
from schatten.signals.two_beta import TwoBeta
from schatten.signals.variance_reduced import VarianceReduced

__all__ = ["AdamRatio", "ErrorFeedback", "Gradient", "Momentum", "Signal", "State", "TwoBeta", "VarianceReduced"]
