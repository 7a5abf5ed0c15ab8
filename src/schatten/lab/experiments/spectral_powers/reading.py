"""The rows of a run by variant, (family, p), and phase."""

from collections.abc import Sequence

from schatten.lab.ledger import Row

Key = tuple[str, float]


def by_variant(rows: Sequence[Row], phase: str) -> dict[Key, list[Row]]:
    """(family, p) -> the rows of a phase: "tune", "final" (seeds at the best lr), "grid" (at the others) or "between"."""
    found: dict[Key, list[Row]] = {}
    for row in rows:
        if row.get("phase") == phase:
            found.setdefault((row["family"], row["p"]), []).append(row)
    return found


def tuned(rows: Sequence[Row]) -> dict[Key, dict[float, float]]:
    """(family, p) -> lr -> loss, of the tuning seed."""
    return {key: {row["lr"]: row["score"] for row in own} for key, own in by_variant(rows, "tune").items()}


def whole_grids(rows: Sequence[Row], key: Key) -> list[dict[float, float]]:
    """lr -> loss of a variant on every seed on which all lr's of its grid were run."""
    grid = tuned(rows).get(key, {})
    by_seed: dict[int, dict[float, float]] = {}
    for phase in ("tune", "final", "grid"):
        for row in by_variant(rows, phase).get(key, ()):
            by_seed.setdefault(row["seed"], {})[row["lr"]] = row["score"]
    return [losses for _, losses in sorted(by_seed.items()) if losses.keys() == grid.keys()]
