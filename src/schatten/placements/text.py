"""Text: where an optimizer's parameters lie and how their directions are computed, in a line for its plan."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch.distributed.tensor import DTensor

from schatten.layout import Piece
from schatten.placements.regions import Arrangement
from schatten.placements.schedule import Traveller
from schatten.placements.spread import of_parameter


class Place(NamedTuple):
    """Parameters on one group of ranks: what holds them, and each spectral one with the way it is computed."""

    holders: str
    spectral: Sequence[tuple[Traveller, str]]


def sharded(p: DTensor) -> str:
    """The ranks of a DTensor's mesh: `sharded over 4 ranks (replicate 2 x shard 2)`."""
    mesh = p.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    sizes = " x ".join(f"{name} {n}".strip() for name, n in zip(names, mesh.shape, strict=True))
    dims = f" ({sizes})" if mesh.ndim > 1 or mesh.mesh_dim_names else ""
    return f"sharded over {plural(mesh.size(), 'rank')}{dims}"


def plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def line(places: Iterable[Place], ranks: int, alone: bool) -> str:
    """What a plan says of `places`; `ranks` are those of the job, `alone` says that some parameters are this process's own.

    Nothing for a process without others.
    """
    if ranks == 1:
        return ""
    found = [_of(place) for place in places]
    if alone:
        found.append(f"{'the rest ' if found else ''}local on each of {ranks} ranks")
    return "; ".join(found)


def _of(place: Place) -> str:
    total = stays = 0
    ways: dict[str, int] = {"owner": 0, "together": 0, "here": 0}
    for t, way in place.spectral:
        blocks = sum(piece.blocks[0] for piece in t.pieces)
        total += blocks
        ways[way] += blocks if way != "here" or t.weights.replicated else 0
        stays += sum(_whole_somewhere(piece, t.weights) for piece in t.pieces) if way == "owner" else 0
    said = [place.holders]
    if total:
        said.append(f"{ways['owner'] - stays} of {total} matrices travel")
    if ways["together"]:
        said.append(f"{ways['together']} computed where they lie, together")
    if ways["here"]:
        said.append(f"{ways['here']} computed by every rank")
    return ", ".join(said)


@lru_cache(maxsize=1024)
def _whole_somewhere(piece: Piece, on: Arrangement) -> int:
    """How many blocks one rank alone holds, all of each: nothing is sent for them."""
    if on.copies > 1:
        return 0
    spread = of_parameter(piece, on)
    return sum(bool(spread.holders(block)) for block in range(len(spread.blocks)))
