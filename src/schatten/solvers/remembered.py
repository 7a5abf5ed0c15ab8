"""Derived constants: computed once, and never traced."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def remembered(derive: Callable[P, R]) -> Callable[P, R]:
    """`derive`, a function of hashable values, kept for each of them; `torch.compile` takes its result as a constant.

    Dynamo looks through `lru_cache` and would trace the derivation itself: a minute for a minimax composition.

    Example:
        >>> from schatten.solvers.remembered import remembered
        >>> calls = []
        >>> square = remembered(lambda x: calls.append(x) or x * x)
        >>> square(3), square(3), calls
        (9, 9, [3])
    """
    cached = lru_cache(maxsize=256)(derive)

    # A plain function, because the mark below does not hold on lru_cache's object.
    @wraps(derive)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    # What torch.compiler.assume_constant_result does, which would import the compiler with this library.
    call._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return call
