"""Tables of what several ranks do: placements of a step, and exchanges behind backward and forward."""

from benchmarks.speed_parts.table import ABSENT, STAMP, Row, Run, Table, mebibytes, spread, stamp


def scaling(run: Run) -> list[Row]:
    rows = []
    for ranks, result in sorted(run.get("ranks", {}).items(), key=lambda item: int(item[0])):
        for name, row in result.get("placements", {}).items():
            times = row.get("milliseconds", {})
            peak = row.get("peak")
            cells = [ranks, name, spread(times.get("clock")), spread(times.get("core")), mebibytes(peak)]
            rows.append([*cells, *stamp(run)])
    return rows


def overlap(run: Run) -> list[Row]:
    rows = []
    for name, row in sorted(run.get("results", {}).items(), key=lambda item: _placement_and_link(item[0])):
        placement, link = _placement_and_link(name)
        plain, other = (row.get("milliseconds", {}).get(key, {}) for key in ("plain", "overlap"))
        ranks = str(run.get("settings", {}).get("ranks", ABSENT))
        cells = [placement, ranks, f"{link:g} MB/s" if link else "none", *(spread(t.get("blocked")) for t in (plain, other))]
        rows.append([*cells, row.get("step ratio", ABSENT), row.get("iteration ratio", ABSENT), *stamp(run)])
    return rows


def _placement_and_link(name: str) -> tuple[str, float]:
    placement, _, link = name.partition(", ")
    return placement, float(link or 0)


TABLES = (
    Table(
        title="Several ranks",
        files={"scaling.json": "run"},
        measured="One step on gloo ranks of one thread each, placements in turn, of the slowest rank: milliseconds by the "
        "clock and on a core, and the most a step allocates. With more ranks than cores they take turns (docs/scaling.md has "
        "what the cost model predicts).",
        command="python benchmarks/scaling.py",
        columns=("ranks", "placement", "by the clock, ms", "on a core, ms", "peak, MiB", *STAMP),
        rows=scaling,
    ),
    Table(
        title="Exchanges behind backward and forward",
        files={"overlap.json": "run"},
        measured="Milliseconds in which a gloo rank stands still in `wait()` of an exchange in one iteration, without "
        "`opt.overlap(model)` and with it, and the times of the step and of the iteration with it over those without. A link "
        "is a rate that exchanges are held to (docs/overlap.md).",
        command="python benchmarks/overlap.py",
        columns=("model", "ranks", "link", "blocked, ms", "with overlap, ms", "step", "iteration", *STAMP),
        rows=overlap,
    ),
)
