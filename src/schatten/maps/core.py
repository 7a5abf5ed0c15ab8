"""The protocol of a convex map, and the two ways to build one from others: `c * map` and `map + map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from schatten.maps.combinations import Scaled, Sum


# What `describe` says where no decay acts.
UNCONSTRAINED = "min F, no constraint (weight_decay is 0)"


@runtime_checkable
class Map(Protocol):
    """A convex function K of a matrix. `value`, `conjugate`, `violation`: (*b, m, n) -> (*b); `grad` keeps the shape."""

    def value(self, S: Tensor) -> Tensor: ...

    def grad(self, S: Tensor) -> Tensor: ...

    def conjugate(self, X: Tensor) -> Tensor: ...

    def violation(self, X: Tensor) -> Tensor: ...

    def describe(self, weight_decay: float, factor: float = 1.0) -> str: ...


class Combinable:
    """Sums and positive multiples of maps are maps: `0.5 * Nuclear() + 0.5 * Frobenius()`."""

    def __mul__(self, factor: float) -> Scaled:
        from schatten.maps.combinations import Scaled

        return Scaled(self, factor)  # type: ignore[arg-type]

    __rmul__ = __mul__

    def __add__(self, other: Map) -> Sum:
        from schatten.maps.combinations import Sum

        return Sum((self, other))  # type: ignore[arg-type]
