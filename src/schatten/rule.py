"""A rule: the one equation of the library with its four slots filled.

gradient --signal--> S --map--> D --scale--> U --retraction--> weight
"""

from dataclasses import dataclass, field

from schatten.maps import Map, Nuclear
from schatten.retractions import DecoupledDecay, Retraction
from schatten.scales import Scale
from schatten.signals import Momentum, Signal


@dataclass(frozen=True)
class Rule:
    """Four frozen slots; `repr(rule)` is the rule's identity, written into checkpoints and compared on load.

    The default is Muon. Numbers that a schedule may change (lr, momentum, weight_decay) are not here but in the
    optimizer's param groups.

    Example:
        >>> import torch, schatten
        >>> rule = schatten.Rule(scale=schatten.scales.Scale("keller"))
        >>> rule.describe(weight_decay=0.5, fan_out=12, fan_in=3)
        'min F subject to spectral norm <= 4.0'
    """

    signal: Signal = field(default_factory=Momentum)
    map: Map = field(default_factory=Nuclear)
    scale: Scale = field(default_factory=Scale)
    retraction: Retraction = field(default_factory=DecoupledDecay)

    def __post_init__(self) -> None:
        slots = {"signal": Signal, "map": Map, "scale": Scale, "retraction": Retraction}
        for name, kind in slots.items():
            filling = getattr(self, name)
            # A class has its instances' methods too, and would fail only in the first step.
            if isinstance(filling, type) or not isinstance(filling, kind):
                what = (
                    f"the class {filling.__name__}: write {filling.__name__}(...)"
                    if isinstance(filling, type)
                    else f"{filling!r}"
                )
                raise TypeError(f"{name} must be a {kind.__name__.lower()} of schatten.{name}s, got {what}.")

    def describe(self, weight_decay: float, fan_out: int, fan_in: int) -> str:
        """What decoupled decay makes this rule solve for a fan_out x fan_in matrix."""
        return self.map.describe(weight_decay, self.scale.factor(fan_out, fan_in))
