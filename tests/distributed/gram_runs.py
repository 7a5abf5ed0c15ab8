"""What one rank of `test_distributed_gram.py` does: directions of its part of matrices, and what it sent for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from schatten.maps import L1, Clip, Frobenius, Huber, Map, Nuclear, Power, PseudoHuber
from schatten.placements import gram
from schatten.solvers import gram as gram_solver
from schatten.solvers import newton_schulz, polynomial, tower
from tests.contracts.matrices import gaussian

SIZES = (2, 3, 4)

BATCH = 5

CUTS = ("chunks", "uneven", "none on the first", "all on the last")


def maps(dtype: str) -> dict[str, Map]:
    """One of every kind that is supported, with products in `dtype`."""
    return {
        "polynomial": Nuclear(polynomial(dtype=dtype)),
        "gram": Nuclear(gram_solver(dtype=dtype)),
        "newton_schulz": Nuclear(newton_schulz(dtype=dtype)),
        "power": Power(0.5, solver=tower(dtype=dtype)),
        "threshold": Huber(0.1, solver=tower(dtype=dtype)),
        "threshold of the Frobenius norm": PseudoHuber(0.05, relative="frobenius", solver=tower(dtype=dtype)),
        "threshold of the spectral norm": Clip(0.2, relative="spectral", solver=tower(dtype=dtype)),
        "sum": 0.5 * Nuclear(polynomial(dtype=dtype)) + 0.5 * Frobenius() + 0.01 * L1(),
    }


class Shape(NamedTuple):
    """Matrices fan_out x fan_in, and which side is spread."""

    fan_out: int
    fan_in: int
    dim: int

    @property
    def length(self) -> int:
        return (self.fan_out, self.fan_in)[self.dim]


SHAPES = {
    "wide": Shape(12, 40, -1),
    "very wide": Shape(8, 130, -1),
    "tall": Shape(40, 12, -2),
    "square by columns": Shape(16, 16, -1),
    "square by rows": Shape(16, 16, -2),
    "one row": Shape(1, 9, -1),
    "fewer columns than ranks": Shape(2, 3, -1),
    "in strips": Shape(130, 400, -1),
}


# Those that every map, and every way to cut, is tried on.
CENTRAL = ("wide", "tall", "fewer columns than ranks")


def cuts(length: int, ranks: int) -> dict[str, list[int]]:
    """Lengths of the ranks' parts."""
    even = [len(part) for part in torch.arange(length).chunk(ranks)]
    uneven = [length * (r + 1) ** 2 // ranks**2 - length * r**2 // ranks**2 for r in range(ranks)]
    none_on_the_first = [0, *uneven[2:], uneven[0] + uneven[1]]
    all_on_the_last = [0] * (ranks - 1) + [length]
    found = (even + [0] * (ranks - len(even)), uneven, none_on_the_first, all_on_the_last)
    return dict(zip(CUTS, found, strict=True))


def batch(shape: Shape, dtype: torch.dtype) -> Tensor:
    return gaussian(BATCH, shape.fan_out, shape.fan_in, seed=shape.fan_in).to(dtype)


def scaled(dtype: torch.dtype) -> Tensor:
    """A matrix, the same times 1e-30, 1e30, zero, and with columns of very different size."""
    S = gaussian(12, 40, seed=1).to(dtype)
    columns = torch.logspace(-30, 0, 40, dtype=dtype)
    return torch.stack([S, S * 1e-30, S * 1e30, 0 * S, S * columns])


def deficient(dtype: torch.dtype) -> Tensor:
    """Rank three."""
    return (gaussian(BATCH, 12, 3, seed=2) @ gaussian(BATCH, 3, 40, seed=3)).to(dtype)


def with_bad(dtype: torch.dtype) -> Tensor:
    """A nan in the last column of the second matrix, an inf in the first column of the fourth."""
    S = batch(SHAPES["wide"], dtype)
    S[1, 3, -1], S[3, 5, 0] = torch.nan, torch.inf
    return S


SPECIAL: dict[str, Callable[[torch.dtype], Tensor]] = {"scaled": scaled, "deficient": deficient, "bad": with_bad}


class Ranks(NamedTuple):
    """A group of the last `size` of all ranks, of which this is one."""

    group: Any
    rank: int
    size: int

    def spread(self, map: Map, S: Tensor, dim: int = -1, cut: str = "uneven") -> Tensor:
        """This rank's part of the direction."""
        own = S.split(cuts(S.shape[dim], self.size)[cut], dim)[self.rank].contiguous()
        return gram.direction(map, own, dim, S.shape[dim], self.group)


def directions(ranks: Ranks, dtype: torch.dtype) -> dict[Any, Tensor]:
    """Keyed (map, shape, cut), of the special matrices (map, name, cut): every map or cut with few shapes, one with all."""
    found: dict[Any, Tensor] = {}
    for of_map, K in maps(str(dtype)).items():
        for of_shape, shape in SHAPES.items():
            first, central = of_map == "polynomial", of_shape in CENTRAL
            if first or central:
                for cut in CUTS if first and central else ("uneven",):
                    found[of_map, of_shape, cut] = ranks.spread(K, batch(shape, dtype), shape.dim, cut)
    for name, made in SPECIAL.items():
        for of_map in ("polynomial", "newton_schulz", "power"):
            found[of_map, name, "uneven"] = ranks.spread(maps(str(dtype))[of_map], made(dtype))
    return found


def half_precision(ranks: Ranks) -> dict[Any, Tensor]:
    """fp32 matrices whose products are in bf16."""
    return {
        (of_map, of_shape, "uneven"): ranks.spread(maps("bfloat16")[of_map], batch(SHAPES[of_shape], torch.float32))
        for of_map in ("polynomial", "gram", "newton_schulz")
        for of_shape in ("very wide", "in strips")
    }


def watched(call: Callable[[], Any], size: int) -> tuple[int, int, float]:
    """Collectives, by torch's own debugging mode, all-reduces among them, and bytes that a ring of `size` sends for these."""
    sent = []
    all_reduce = dist.all_reduce

    def counted(t: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(t.nbytes)
        return all_reduce(t, *args, **options)

    mode = CommDebugMode()
    with mock.patch.object(dist, "all_reduce", counted), mode:
        call()
    return mode.get_total_counts(), len(sent), 2 * (size - 1) / size * sum(sent)


def traffic(ranks: Ranks) -> dict[Any, tuple[int, int, float]]:
    """Of batches of one and of five, keyed (map, shape, matrices)."""
    found = {}
    for of_map, K in maps("float32").items():
        for of_shape in ("wide", "in strips"):
            for matrices in (1, BATCH):
                S = batch(SHAPES[of_shape], torch.float32)[:matrices]
                found[of_map, of_shape, matrices] = watched(partial(ranks.spread, K, S), ranks.size)
    return found


def small_matrices(ranks: Ranks) -> dict[torch.dtype, Tensor]:
    """X X^T as this rank has it."""
    S = batch(SHAPES["in strips"], torch.float32)
    own = S.split(cuts(S.shape[-1], ranks.size)["uneven"], -1)[ranks.rank]
    columns = gram._Spread(S.shape[-1], gram._Group(ranks.group))
    return {dtype: columns.gram(own.to(dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


def seen(ranks: Ranks) -> dict[str, Any]:
    return {
        "float64": directions(ranks, torch.float64),
        "float32": directions(ranks, torch.float32),
        "bfloat16": half_precision(ranks) if ranks.size == 2 else {},
        "traffic": traffic(ranks),
        "small": small_matrices(ranks),
    }


def of_rank(rank: int, size: int) -> dict[int, dict[str, Any]]:
    """What this rank saw in each group it is in. Constants of solvers take each process seconds, so it is in several."""
    found = {}
    for members in SIZES:
        group = dist.new_group(list(range(size - members, size)))
        if rank >= size - members:
            found[members] = seen(Ranks(group, rank - (size - members), members))
    return found
