"""The protocol of a retraction, and what all of them need."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

State = Mapping[str, Tensor]


@runtime_checkable
class Retraction(Protocol):
    """`(W, D, length, state, group) -> (new W, new state)`, pure: how a direction reaches the weight.

    W and D are stacks of matrices (parameters, blocks, fan_out, fan_in); `length` is lr c(shape), a number or a tensor that
    multiplies D, so that the update U = c D is never a tensor of its own. lr, weight_decay and the rule's other numbers are
    in `group`. `init`, `state`, `hyperparameters` and `elementwise` are as for a signal (`schatten.signals.core`).
    """

    hyperparameters: ClassVar[tuple[str, ...]]
    elementwise: ClassVar[bool]

    def init(self, W: Tensor) -> dict[str, Tensor]: ...

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class Stateless:
    """A retraction that keeps nothing and reads no numbers but lr and weight_decay."""

    hyperparameters: ClassVar[tuple[str, ...]] = ()

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {}


def lr_of(group: Mapping[str, Any]) -> float | Tensor:
    """The group's lr, a number or a tensor without dimensions, which does not change the dtype of what it multiplies."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def decay_of(group: Mapping[str, Any]) -> float | Tensor:
    """lr lambda, the share of a weight that decoupled decay takes in a step; without the shape factor."""
    return lr_of(group) * group["weight_decay"]


def minus_(X: Tensor, D: Tensor, length: float | Tensor) -> Tensor:
    """X - length D, into X."""
    if isinstance(length, Tensor):
        return X.addcmul_(D, length.to(X), value=-1)
    return X.add_(D, alpha=-length)
