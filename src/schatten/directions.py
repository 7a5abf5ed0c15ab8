"""Directions: what fills the map's slot of a rule without being a convex map.

Normalising rows before or after the polar factor, dividing by a second moment, low rank with its own feedback: such parts
have state or no K, so they keep the map's place but only one verb, the call.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from schatten.maps.core import UNCONSTRAINED

State = Mapping[str, Tensor]


@runtime_checkable
class Direction(Protocol):
    """`(S, state, group) -> (D, new state)`, pure, on stacks of whole matrices (parameters, blocks, fan_out, fan_in).

    `init`, `state` and `hyperparameters` are as for a signal (`schatten.signals.core`). `describe` says what decoupled decay
    implies for the weights of a rule with shape factor `factor`.
    """

    hyperparameters: ClassVar[tuple[str, ...]]

    def init(self, W: Tensor) -> dict[str, Tensor]: ...

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]: ...

    def describe(self, weight_decay: float, factor: float = 1.0) -> str: ...


class NoK:
    """A direction that is no gradient of a convex K and reads no numbers; stateless unless it has its own `init`.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, schatten
        >>> @dataclass(frozen=True)
        ... class SignOfPolar(schatten.directions.NoK):
        ...     def __call__(self, S, state, group):
        ...         return schatten.polar(S).sign(), {}
        >>> rule = schatten.Rule(map=SignOfPolar())
        >>> opt = schatten.SpectralOptimizer([torch.nn.Parameter(torch.zeros(4, 3))], rule, lr=0.01, momentum=0.9)
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ()

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {}

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        """Such a direction implies no problem that decay would make a rule solve."""
        return UNCONSTRAINED if weight_decay == 0 else "min F with decay; no convex K, so no problem is implied"


def rescaled(X: Tensor, size: Tensor, wanted: Tensor | float) -> Tensor:
    """X wanted / size, where a size of zero gives zero; sizes broadcast against X.

    Example:
        >>> import torch, schatten
        >>> X = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> schatten.directions.rescaled(X, X.norm(dim=-1, keepdim=True), 1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return X * torch.where(size > 0, wanted / size, 0.0)
