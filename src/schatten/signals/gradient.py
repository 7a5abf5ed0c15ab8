"""The gradient itself: no memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from schatten.signals.core import State


@dataclass(frozen=True)
class Gradient:
    """S = G. For rules without momentum, and for those whose direction keeps its own (Dion). No state.

    Example:
        >>> import torch, schatten
        >>> signal = schatten.signals.Gradient()
        >>> S, state = signal(torch.ones(1, 1, 2, 2), {}, {})
        >>> bool((S == 1).all()), state
        (True, {})
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return G, {}
