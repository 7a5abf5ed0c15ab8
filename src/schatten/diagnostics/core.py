"""What quantities are: functions of tensors, and, for `Monitor`, parts that read them off the matrices of an optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from schatten.rule import Rule

Need = Literal["gradient", "momentum", "update", "hessian", "losses"]


class Estimate(NamedTuple):
    """A number found by chance and its standard error, tensors of one shape; the error is 0 where the value is exact.

    The error says how far another draw would fall, so value +- 2 error holds the true number about 19 times in 20.
    """

    value: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Equal logical matrices of one parameter as their rule sees them; tensors are (blocks, fan_out, fan_in).

    What a quantity does not need is None. `hessian` gives the product of the loss's Hessian in these blocks alone with a
    direction of their shape, (blocks, fan_out, fan_in) each way.
    """

    name: str
    rule: Rule
    group: Mapping[str, Any]
    weight: Tensor
    gradient: Tensor | None = None
    momentum: Tensor | None = None
    update: Tensor | None = None
    hessian: Callable[[Tensor], Tensor] | None = None

    @property
    def factor(self) -> float:
        """c(shape): the length of the rule's update in units of lr D."""
        return self.rule.scale.factor(*self.weight.shape[-2:])


@dataclass(frozen=True, eq=False)
class Whole:
    """A model as quantities of all its parameters see it: trainable parameters by name, losses of separate micro-batches."""

    parameters: Mapping[str, Tensor]
    blocks: Sequence[Block]
    losses: Sequence[Callable[[], Tensor]] = ()


@runtime_checkable
class Quantity(Protocol):
    """What `Monitor` logs, found by its `name` in this folder; a frozen dataclass, whose fields are its options.

    A quantity of each matrix is called with a `Block`, one of the `scope` "model" with a `Whole`. It returns tensors by name,
    numbers or one for each block, (blocks,), on the device and without waiting for it. `columns` says of each name
    what it is and in which unit, `needs` what it reads besides weights, `cost` what it computes, in Hessian-vector products or
    matrix products.

    A quantity may also have `check(of: Whole) -> None`, which raises for a model it cannot measure, at construction of the
    monitor and not in the middle of a training; and `alarm(previous, now) -> str | None`, which says what is wrong if the
    numbers of one matrix, by column, changed from `previous` to `now` as they never should.
    """

    name: ClassVar[str]
    scope: ClassVar[Literal["matrix", "model"]]
    needs: ClassVar[frozenset[Need]]
    columns: ClassVar[Mapping[str, str]]
    cost: ClassVar[str]

    def __call__(self, of: Any) -> Mapping[str, Tensor]: ...
