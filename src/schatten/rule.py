"""A rule: the one equation of the library with its four slots filled.

gradient --signal--> S --map--> D --scale--> U --retraction--> weight
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from schatten.directions import Direction, State
from schatten.maps import Map, Nuclear
from schatten.retractions import DecoupledDecay, Retraction
from schatten.scales import RMS, Factor, Scale
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
    map: Map | Direction = field(default_factory=Nuclear)
    scale: Factor = field(default_factory=Scale)
    retraction: Retraction = field(default_factory=DecoupledDecay)

    def __post_init__(self) -> None:
        slots = {"signal": (Signal,), "map": (Map, Direction), "scale": (Factor,), "retraction": (Retraction,)}
        for name, kinds in slots.items():
            filling = getattr(self, name)
            # A class has its instances' methods too, and would fail only in the first step.
            if isinstance(filling, type) or not fits(filling, kinds):
                what = (
                    f"the class {filling.__name__}: write {filling.__name__}(...)"
                    if isinstance(filling, type)
                    else f"{filling!r}"
                )
                raise TypeError(f"{name} must be a {name} of schatten.{name}s, got {what}.")

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """The numbers besides lr and weight_decay that the slots read from a param group."""
        parts = (self.signal, self.map, self.retraction)
        return tuple(dict.fromkeys(key for part in parts for key in getattr(part, "hyperparameters", ())))

    def init(self, W: Tensor) -> dict[str, Tensor]:
        """The state of one parameter, W an empty tensor (blocks, fan_out, fan_in) of the state's precision."""
        state: dict[str, Tensor] = {}
        for part in (self.signal, self.map, self.retraction):
            own = {} if isinstance(part, Map) else part.init(W)
            if shared := set(own) & set(state):
                raise ValueError(f"Two slots of a rule keep state under one name, {sorted(shared)}: {self!r}.")
            state.update(own)
        return state

    def direction(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """D of the signal S by the map or what stands in its place, and its new state."""
        if fits(self.map, (Map,)):
            return self.map.grad(S), {}  # type: ignore[union-attr]
        return self.map(S, state, group)  # type: ignore[operator]

    def describe(self, weight_decay: float, fan_out: int, fan_in: int) -> str:
        """What decoupled decay makes this rule solve for a fan_out x fan_in matrix; a measured scale counts as of U V^T."""
        problem = self.map.describe(weight_decay, self.scale.factor(fan_out, fan_in))
        return f"{problem}, for D as long as U V^T" if weight_decay and isinstance(self.scale, RMS) else problem


# What was found of classes: a step builds its rules anew, and Python looks at every member of a protocol each time.
_FITTING: dict[tuple[type, tuple[type, ...]], bool] = {}


def fits(filling: object, kinds: tuple[type, ...]) -> bool:
    """Whether `filling` is one of `kinds`; a protocol's members are looked for once for each class."""
    key = type(filling), kinds
    if key not in _FITTING:
        _FITTING[key] = isinstance(filling, kinds)
    return _FITTING[key]
