"""The maps to compare: every one of `schatten.maps`, found by its listing, with the arguments of the table of K."""

import dataclasses
import math
from typing import Any

import torch

from schatten import maps, solvers
from schatten.maps import Map
from schatten.maps.potential import Thresholded

MUON = "Nuclear"

# What maps are made of, not maps of their own.
COMBINATIONS = ("Map", "Scaled", "Sum")

# Far enough from the origin to be outside of any domain that is not everything.
FAR = 1e6


def arguments(threshold: float, rank: int) -> dict[str, list[dict[str, Any]]]:
    """Of maps that take some; `rank` is the smaller side of the matrices."""
    return {
        **{cls: [{"a": threshold}] for cls in maps.__all__ if issubclass(getattr(maps, cls), Thresholded)},
        "Schatten": [{"p": 4 / 3}, {"p": 4.0}, {"p": math.inf}],
        "Power": [{"p": 1.0}, {"p": 0.5}, {"p": 0.25}],
        "KyFan": [{"count": max(1, rank // 4)}],
        "Ordered": [{"weights": tuple(1 / (i + 1) for i in range(rank))}],
        "L1": [{"over": "entries"}, {"over": "rows"}],
    }


def table(threshold: float, rank: int, *, exact: bool = True) -> dict[str, Map]:
    """Name -> map, Muon's first; with `exact` all directions by SVD."""
    found: dict[str, Map] = {}
    for cls in sorted(maps.__all__, key=lambda cls: cls != MUON):
        for own in arguments(threshold, rank).get(cls, [{}]) if cls not in COMBINATIONS else ():
            kind = getattr(maps, cls)
            solver = {"solver": solvers.svd()} if exact and "solver" in {f.name for f in dataclasses.fields(kind)} else {}
            found[name(cls, own)] = kind(**own, **solver)
    return found


def name(cls: str, own: dict[str, Any]) -> str:
    """`Power 0.5`, `KyFan 8`, `L1 rows`; a threshold, which is the same for all, and weights are left out."""
    words = [f"{v:.3g}" if isinstance(v, float) else f"{v}" for key, v in own.items() if key not in ("a", "weights")]
    return " ".join([cls, *words])


def dual_ball(K: Map, Y: torch.Tensor) -> torch.Tensor:
    """The gauge of Y (*b, m, n) in the domain of K*: at most 1 inside, 0 where the domain is everything; (*b) in fp64.

    A domain is a ball {gauge <= radius} whose violation is gauge - radius outside, which two points far out tell apart.
    """
    size = torch.linalg.matrix_norm(Y.double(), keepdim=True)
    far = Y.double() * (FAR / torch.where(size == 0, 1, size))
    first, second = K.violation(far), K.violation(2 * far)
    gauge = second - first
    radius = torch.where(first > 0, gauge - first, 1)
    return torch.where(first > 0, gauge / radius * size[..., 0, 0] / FAR, 0.0)
