"""The protocol of a convex map."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Map(Protocol):
    """A convex function K of a matrix. `value`, `conjugate`, `violation`: (*b, m, n) -> (*b); `grad` keeps the shape."""

    def value(self, S: Tensor) -> Tensor: ...

    def grad(self, S: Tensor) -> Tensor: ...

    def conjugate(self, X: Tensor) -> Tensor: ...

    def violation(self, X: Tensor) -> Tensor: ...

    def describe(self, weight_decay: float, factor: float = 1.0) -> str: ...
