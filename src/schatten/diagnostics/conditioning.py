"""Conditioning: how unequal a matrix's singular values are, and what a map leaves of it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.singular_values import singular_values
from schatten.maps import Map, Scaled, Sum
from schatten.solvers import svd


class Conditioning(NamedTuple):
    """Condition numbers, each (*b): of a signal, of a map's direction, and of the direction that an exact solver would give."""

    before: Tensor
    after: Tensor
    exact: Tensor


def numerical_rank(matrix: Tensor, *, rtol: float | None = None) -> Tensor:
    """How many singular values of matrices (*b, m, n) exceed rtol times the largest: (*b), whole numbers in fp64.

    The default rtol is max(m, n) eps, the rounding of the matrix's entries: eps of its dtype, or of fp32 for half precision,
    which is taken for its exact value. One SVD without vectors. 0 for a zero matrix, nan for one that is not finite; raises as
    `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.conditioning import numerical_rank
        >>> float(numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-9]))))
        2.0
    """
    return _count(singular_values(matrix), _threshold(matrix, rtol))


def condition_number(matrix: Tensor, *, rtol: float | None = None) -> Tensor:
    """The largest singular value by the smallest that counts for `numerical_rank`, of matrices (*b, m, n): (*b) in fp64.

    1 for a multiple of U V^T, whatever its rank. One SVD without vectors. nan for a zero matrix, which has none, and for one
    that is not finite; raises as `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.conditioning import condition_number
        >>> round(float(condition_number(torch.diag(torch.tensor([8.0, 2.0, 0.0])))), 6)
        4.0
    """
    s = singular_values(matrix)
    return _quotient(s, _count(s, _threshold(matrix, rtol)))


def conditioning(map: Map, signal: Tensor, *, rtol: float | None = None) -> Conditioning:
    """Condition numbers before and after a map, by its own solver and by an exact one.

    Of the spectral powers cond(Psi_p(S)) = cond(S)^p (arXiv 2602.04669, Sec. 3.4), 1 for Muon; `exact` has that. `after` is
    what the solver of `map` makes of it, where small singular values may come out too small (a polynomial's) or damped. All
    count as many singular values as the numerical rank of `signal`, so a map that drops some of them to 0 has inf.

    Cost: the direction twice, once by an SVD, and three SVDs without vectors. nan for a signal that is zero or not finite.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.conditioning import conditioning
        >>> S = torch.diag(torch.tensor([1.0, 0.01]))
        >>> [round(float(c), 2) for c in conditioning(schatten.maps.Power(0.5, solver=schatten.solvers.svd()), S)]
        [100.0, 10.0, 10.0]
    """
    s = singular_values(signal)
    count = _count(s, _threshold(signal, rtol))
    directions = (map.grad(signal), exactly(map).grad(signal.double()))
    return Conditioning(_quotient(s, count), *(_quotient(singular_values(D), count) for D in directions))


def exactly(map: Map) -> Map:
    """The same map with SVDs for its solvers."""
    if isinstance(map, Scaled):
        return replace(map, map=exactly(map.map))
    if isinstance(map, Sum):
        return replace(map, maps=tuple(exactly(part) for part in map.maps))
    return replace(map, solver=svd()) if "solver" in {field.name for field in fields(map)} else map  # type: ignore[arg-type]


@dataclass(frozen=True)
class Condition:
    """Condition numbers of the momentum and of the direction that the rule's map makes of it.

    Momentum is what the rule keeps: with Nesterov's form its signal differs a little. The direction's columns are missing where
    the rule has no convex map (as SOAP), all where it keeps no momentum. Singular values that are rounding do not count
    (`numerical_rank`).

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.conditioning import Condition
        >>> from schatten.diagnostics.core import Block
        >>> M = torch.diag(torch.tensor([4.0, 1.0]))[None]
        >>> found = Condition()(Block("w", schatten.Rule(), {}, torch.zeros(1, 2, 2), momentum=M))
        >>> round(float(found["momentum"]), 4), round(float(found["exact"]), 4), float(found["direction"]) < 1.4
        (4.0, 1.0, True)
    """

    name: ClassVar[str] = "conditioning"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"momentum"})
    columns: ClassVar[Mapping[str, str]] = {
        "momentum": "largest by smallest singular value that is not rounding, of the momentum",
        "direction": "the same of the direction by the map's own solver, over as many singular values",
        "exact": "the same of the direction by SVD",
    }
    cost: ClassVar[str] = "the direction, one SVD and three SVDs without vectors, in fp64"

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        if of.momentum is None:
            return {}
        if not isinstance(of.rule.map, Map):
            return {"momentum": condition_number(of.momentum)}
        found = conditioning(of.rule.map, of.momentum)
        return {"momentum": found.before, "direction": found.after, "exact": found.exact}


def _threshold(matrix: Tensor, rtol: float | None) -> float:
    if rtol is not None:
        if not 0 <= rtol < 1:
            raise ValueError(f"rtol must be a share of the largest singular value, 0 <= rtol < 1, got {rtol}.")
        return rtol
    return max(matrix.shape[-2:]) * min(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)


def _count(s: Tensor, rtol: float) -> Tensor:
    """How many of (*b, r) count, nan where they are nan."""
    return (s > rtol * s[..., :1]).sum(-1) + 0.0 * s.sum(-1)


def _quotient(s: Tensor, count: Tensor) -> Tensor:
    """The first of (*b, r) by the last that counts, nan without one."""
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], torch.nan)
    last = s.gather(-1, (count.nan_to_num() - 1).clamp(min=0).long()[..., None])[..., 0]
    return torch.where(count > 0, s[..., 0] / last, torch.nan)


QUANTITY = Condition
