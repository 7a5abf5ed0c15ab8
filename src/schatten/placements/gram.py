"""Distributed Gram: the direction of matrices whose long side is spread over ranks, on ranks that hold no whole matrix.

Rank r holds the columns X_r of X = [X_1 ... X_N], (m, n) with m <= n. A polynomial of X mixes columns in X X^T alone, which
is the sum of X_r X_r^T: one all-reduce of m x m for each one formed. All else is a product of small matrices that every
rank has alike with its own columns. Norms take one more, of a number. All matrices of a batch share each all-reduce.

Sums of half-precision products travel in fp32, so that no rank's addition is rounded, and of symmetric matrices little more
than the lower half does: the bytes of the whole in half precision.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from schatten import kernels
from schatten.functions import with_dtype
from schatten.maps import Frobenius, Map, Nuclear
from schatten.maps.combinations import Scaled, Sum
from schatten.maps.lifts import safe_norm
from schatten.maps.potential import Potential
from schatten.placements.cost import seen
from schatten.placements.machine import Machine, Operation
from schatten.rule import Rule
from schatten.solvers.core import ColumnFunctionSolver, Columns, ColumnSolver, frobenius

# Strips of rows, each up to the diagonal: of so many, (1 + 1 / STRIPS) / 2 of a symmetric matrix travels. Narrower ones than
# LEAST rows are not worth a copy each.
STRIPS = 8
LEAST = 64

# The maps whose `grad` is known here; one with a `grad` of its own is another function of its signal.
KNOWN = (Frobenius.grad, Nuclear.grad, Potential.grad, Scaled.grad, Sum.grad)


def supports(rule: Rule, fan_out: int, fan_in: int, dim: int) -> bool:
    """Whether ranks can compute a rule's direction each on its part of fan_out x fan_in matrices, spread along `dim`.

    The side that is spread, rows for `dim` -2 and columns for -1, must be the longer one or one of two equal ones, and the
    map `Nuclear` with `polynomial`, `gram` or `newton_schulz`, a spectral potential on the tower, a potential of entries,
    `Frobenius`, or a sum or multiple of these. Exact SVDs, Krylov spaces, coupled iterations and what is no map need whole
    matrices. So does the tower where rows of a square one are spread: it reads the spectral norm off X X^T, and off X^T X
    it would read another in the third digit.

    Example:
        >>> import schatten
        >>> from schatten.placements import gram
        >>> muon, exact = schatten.Rule(), schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.svd()))
        >>> gram.supports(muon, 64, 16, -2), gram.supports(muon, 64, 16, -1), gram.supports(exact, 64, 16, -2)
        (True, False, False)
    """
    return _by_columns(rule.map, turned=dim == -2 and fan_out == fan_in) is not None and (
        fan_in >= fan_out if dim == -1 else fan_out >= fan_in
    )


@torch.no_grad()
def direction(map: Map, S: Tensor, dim: int, length: int, group: dist.ProcessGroup | None) -> Tensor:
    """grad K(S) of matrices (m, n) spread over the ranks of `group` along one side, for this rank's part; a collective.

    Args:
        map: a map that `supports` accepts for these matrices, equal on all ranks.
        S: this rank's part of a batch, (b, m, n / ranks) for `dim` -1 or (b, m / ranks, n) for -2; parts may be of any
            length, 0 among them.
        dim: the side that is spread, -1 or -2.
        length: that side's length over all ranks, at least the other side's.
        group: the ranks that hold parts, None for all.

    Equal to `map.grad` of the whole up to the rounding of sums in another order: the form of the iteration and its restarts
    are those of (m, n). A zero matrix gives zero, a non-finite one non-finite values on all ranks, and none touches another
    of its batch. One all-reduce for each X X^T that the solver forms and one for norms, for each map of a sum; `work` counts
    them.

    Raises ValueError for what `supports` refuses.

    Example:
        >>> import torch, schatten
        >>> import torch.distributed as dist
        >>> from schatten.placements import gram
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> D = gram.direction(schatten.maps.Nuclear(), torch.ones(1, 2, 5), -1, 5, None)
        >>> bool(torch.allclose(D, schatten.maps.Nuclear().grad(torch.ones(1, 2, 5))))
        True
        >>> dist.destroy_process_group()
    """
    if S.ndim != 3 or dim not in (-1, -2):
        raise ValueError(f"S must be a batch (b, m, n), spread along dim -1 or -2, got shape {tuple(S.shape)} and dim={dim}.")
    turned = dim == -2
    X = S.mT if turned else S
    b, m, held = X.shape
    if m > length:
        raise ValueError(
            f"The long side must be the one that is spread, but it has {length} entries and the other {m}: gather the matrices."
        )
    grad = _by_columns(map, turned and m == length)
    if grad is None:
        raise ValueError(f"{map!r} needs whole matrices: gather them, or take a map and a solver that `supports` accepts.")
    if b * m * length == 0:
        return S.clone()
    # A column of zeros changes no sum, and spares every operation its empty case.
    D = grad(X if held else X.new_zeros(b, m, 1), _Spread(length, _Group(group)))[..., :held]
    return D.mT if turned else D


def _by_columns(map: Any, turned: bool = False) -> Callable[[Tensor, Columns], Tensor] | None:
    """grad K on some of the columns, or None where that takes the whole matrix; `turned` if they are a square one's rows."""
    if getattr(type(map), "grad", None) not in KNOWN:
        return None
    match map:
        case Scaled(map=K, c=c):
            of_part = _by_columns(K, turned)
            return None if of_part is None else lambda X, columns: c * of_part(X, columns)
        case Sum(maps=maps):
            parts = [part for K in maps if (part := _by_columns(K, turned)) is not None]
            if len(parts) < len(maps):
                return None
            return lambda X, columns: reduce(torch.add, (part(X, columns) for part in parts))
        case Nuclear(solver=solver) if isinstance(solver, ColumnSolver):
            return lambda X, columns: solver.of_columns(X, columns).to(X.dtype)
        case Frobenius():
            return lambda X, columns: kernels.quotient(X, columns.frobenius(X), X.dtype)
        case Potential(over="spectrum", solver=solver) if isinstance(solver, ColumnFunctionSolver) and not turned:
            return lambda X, columns: solver.apply_to_columns(X, map, columns).to(X.dtype)
        case Potential(over="entries", relative=None):
            return lambda X, columns: map.grad(X)
    return None


# -- sums over ranks ---------------------------------------------------------------------------------------------------


class _Wire(Protocol):
    @property
    def ranks(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def add_(self, t: Tensor) -> None:
        """Make `t` the sum of all ranks' `t`."""


@dataclass(frozen=True)
class _Group:
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def add_(self, t: Tensor) -> None:
        dist.all_reduce(t, group=self.group)


@dataclass(frozen=True)
class _Spread:
    """`Columns` of which a rank holds some: `length` in all."""

    length: int
    wire: _Wire

    def gram(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        A = kernels.gram(X, out=out)
        bounds = _strips(A.shape[-1])
        sizes = [len(A) * (end - start) * end for start, end in bounds]
        packed = A.new_empty(sum(sizes), dtype=torch.promote_types(A.dtype, torch.float32))
        strips = [t.view(len(A), -1, end) for t, (_, end) in zip(packed.split(sizes), bounds, strict=True)]
        for strip, (start, end) in zip(strips, bounds, strict=True):
            strip.copy_(A[:, start:end, :end])
        self.wire.add_(packed)
        for strip, (start, end) in zip(strips, bounds, strict=True):
            A[:, start:end, :end] = strip
            A[:, :start, start:end] = strip[:, :, :start].mT
        return A

    def frobenius(self, X: Tensor) -> Tensor:
        return frobenius(X, self._total)

    def count(self, X: Tensor) -> int:
        return self.length

    def _total(self, norms: Tensor) -> Tensor:
        # Each rank's beside the others', as a sum of their squares might overflow.
        of_ranks = norms.new_zeros(self.wire.ranks, *norms.shape)
        of_ranks[self.wire.rank] = norms
        self.wire.add_(of_ranks)
        return safe_norm(of_ranks.double(), 0).squeeze(0).to(norms.dtype)


def _strips(m: int) -> list[tuple[int, int]]:
    """The rows of each strip."""
    count = max(1, min(STRIPS, m // LEAST))
    return list(pairwise(m * k // count for k in range(count + 1)))


# -- what it costs -----------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """One matrix's direction on the rank that holds most of it: its operations, bytes it sends, and collectives it joins."""

    operations: tuple[Operation, ...]
    sent: float
    collectives: int

    @property
    def flops(self) -> float:
        return sum(operation.flops for operation in self.operations)


@lru_cache(maxsize=4096)
def work(map: Map, m: int, n: int, ranks: int, dtype: str = "float32") -> Work:
    """The work of `direction` on a matrix (m, n), m <= n, spread over `ranks` along n, counted by running it without data.

    Products that the map leaves open are in `dtype`. Of a batch the operations and bytes add up and the collectives do not.
    A ring sends 2 (ranks - 1) / ranks of what it adds up.

    Example:
        >>> import schatten
        >>> from schatten.placements import gram
        >>> muon = schatten.maps.Nuclear(schatten.solvers.newton_schulz())
        >>> gram.work(muon, 32, 256, ranks=4)[1:]  # five sums of 32 x 32 in fp32, and three norms
        (30744.0, 6)
    """
    grad = _by_columns(with_dtype(map, dtype))
    if grad is None:
        raise ValueError(f"{map!r} needs whole matrices, so there is no work on parts of them.")
    wire = _Counter(ranks)
    X = torch.empty(1, m, -(-n // ranks), device="meta")
    with torch.no_grad():
        _, operations = seen(lambda: grad(X, _Spread(n, wire)))
    return Work(operations, wire.sent, wire.collectives)


@dataclass
class _Counter:
    """A wire that only counts."""

    ranks: int
    rank: int = field(default=0, init=False)
    sent: float = field(default=0.0, init=False)
    collectives: int = field(default=0, init=False)

    def add_(self, t: Tensor) -> None:
        self.collectives += 1
        self.sent += 2 * (self.ranks - 1) / self.ranks * t.nbytes


def cheaper(map: Map, m: int, n: int, ranks: int, matrices: int, machine: Machine, dtype: str = "float32") -> bool:
    """Whether `direction` takes less time for `matrices` of (m, n), m <= n, than to gather whole ones on their owners.

    Gathered, they are shared out one by one, so the busiest rank has the next whole number of `matrices` / `ranks`: it
    sends its parts of all others and, in a second collective, the other ranks' parts of its directions, in fp32. A pure
    function: ranks with one `machine` agree.

    Example:
        >>> import schatten
        >>> from schatten.placements import gram
        >>> from schatten.placements.machine import MACHINES
        >>> [gram.cheaper(schatten.maps.Nuclear(), 1024, n, 8, 1, MACHINES["h100-nvlink"], "bfloat16") for n in (1024, 65536)]
        [False, True]
    """
    here = work(map, m, n, ranks, dtype)
    spread = machine.seconds(here.operations, matrices)
    spread += here.collectives * machine.collective(matrices * here.sent / max(1, here.collectives), ranks)
    own = -(-matrices // ranks)
    part = 4 * m * n / ranks
    gathered = machine.seconds(_whole(map, m, n, dtype), own)
    gathered += machine.collective((matrices - own) * part, ranks) + machine.collective(own * (ranks - 1) * part, ranks)
    return spread < gathered


@lru_cache(maxsize=4096)
def _whole(map: Map, m: int, n: int, dtype: str) -> tuple[Operation, ...]:
    X = torch.empty(1, m, n, device="meta")
    with torch.no_grad():
        return seen(lambda: with_dtype(map, dtype).grad(X))[1]
