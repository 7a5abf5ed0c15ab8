"""Assignment: which rank computes which block, and in which buckets blocks travel.

Longest processing time first: blocks by falling cost, each to the rank with the least to do, which is within 4/3 of the best
possible (R. L. Graham, 1969). A block that some ranks hold whole stays with the least busy of them and does not travel.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def assign(
    costs: Sequence[float], ranks: int, loads: list[float] | None = None, allowed: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """The owner of each block: `allowed` says who may have it, all ranks where that is empty; `loads` is brought up to date.

    Example:
        >>> from schatten.placements.assignment import assign
        >>> assign([1.0, 3.0, 2.0, 2.0], ranks=2)
        [0, 0, 1, 1]
        >>> assign([1.0, 3.0], ranks=2, allowed=[(), (1,)])
        [0, 1]
    """
    loads = [0.0] * ranks if loads is None else loads
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        may = (allowed[i] if allowed is not None else ()) or range(ranks)
        owners[i] = min(may, key=lambda rank: loads[rank])
        loads[owners[i]] += costs[i]
    return owners


def buckets(items: Iterable[tuple[T, int, int]], ranks: int, limit: int) -> list[list[T]]:
    """Items `(item, size, largest block's size)` in their order, in buckets of size `limit` for each rank.

    A bucket takes a block for each rank whatever their size, as a matrix cannot be computed in pieces.

    Example:
        >>> from schatten.placements.assignment import buckets
        >>> buckets([("a", 4, 4), ("b", 4, 4), ("c", 4, 4), ("d", 4, 4), ("e", 9, 9)], ranks=2, limit=8)
        [['a', 'b', 'c', 'd'], ['e']]
    """
    found: list[list[T]] = []
    used, largest = 0, 0
    for item, size, block in items:
        larger = max(largest, block)
        if not found or used + size > ranks * max(limit, larger):
            found.append([])
            used, larger = 0, block
        found[-1].append(item)
        used, largest = used + size, larger
    return found
