"""The protocol of a signal."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

State = Mapping[str, Tensor]


def check_switch(name: str, value: Any) -> None:
    """Raise ValueError for what is neither True nor False: any other value would pass for one of them in silence."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_size(name: str, value: Any) -> None:
    """Raise ValueError for what is no finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}.")


@runtime_checkable
class Signal(Protocol):
    """`(G, state, group) -> (S, new state)`, pure.

    G and S are stacks of matrices (parameters, blocks, fan_out, fan_in). `init(W)` makes the state of one parameter, given
    an empty tensor (blocks, fan_out, fan_in) of the precision of state; each tensor starts with the dimension `blocks`.
    `state` is what `init` made, stacked over parameters, and under `"step"` the number of steps of each parameter, this one
    included, as (parameters, 1, 1, 1). `hyperparameters` names the numbers read from the group. `elementwise` promises
    that every state tensor has the matrix's shape and that any rows of a matrix may be given without the others. A signal
    that squares gradients says `squares = True`: gradients whose squares overflow are skipped. One
    that reads what one preset's `evaluate` puts into its state names that preset in `fed_by`; others refuse it.
    """

    hyperparameters: ClassVar[tuple[str, ...]]
    elementwise: ClassVar[bool]

    def init(self, W: Tensor) -> dict[str, Tensor]: ...

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]: ...
