"""Tables of what runs in one process of a CPU: steps, their memory, directions, presets, and a monitor's cost."""

import statistics
from collections.abc import Sequence

from benchmarks.speed_parts.table import ABSENT, STAMP, Row, Run, Table, mebibytes, number, quartiles, ratio, spread, stamp


def step_time(run: Run) -> list[Row]:
    found = run.get("optimizers", {})
    own = found.get("schatten.Muon", {}).get("milliseconds")
    rows = []
    for name, row in sorted(found.items(), key=lambda item: (_median(item[1].get("milliseconds")), item[0])):
        low, high = (f"{gain:.3f}" for gain in row.get("band") or (float("nan"),) * 2)
        error = row.get("orthogonality error")
        times = row.get("milliseconds")
        band = f"{low} - {high}" if row.get("band") else ABSENT
        rows.append([name, spread(times), ratio(times, own), band, ABSENT if error is None else f"{error:.3f}", *stamp(run)])
    return rows


def _median(times: Sequence[float] | None) -> float:
    return statistics.median(times) if times else float("inf")


def step_memory(run: Run) -> list[Row]:
    largest = run.get("largest_batch")
    return [
        [f"{allowed} MiB", mebibytes(peak), f"{peak / largest:.2f}" if largest else ABSENT, *stamp(run)]
        for allowed, peak in sorted(run.get("peak_bytes_by_max_batch_mib", {}).items(), key=lambda item: int(item[0]))
    ]


def solvers(run: Run) -> list[Row]:
    rows = []
    found = run.get("solvers", {})
    for name, row in found.items():
        if "milliseconds" not in row:  # ratios of two lines above
            continue
        over = row.get("over")
        errors = [f"{row[key]:.1e}" if key in row else ABSENT for key in ("worst", "gaussian")]
        times, base = row["milliseconds"], found.get(over, {}).get("milliseconds")
        rows.append([name, spread(times), ratio(times, base), over or ABSENT, *errors, *stamp(run)])
    return rows


def presets(run: Run) -> list[Row]:
    rows = []
    found = run.get("presets", {})
    for name, row in sorted(found.items(), key=lambda item: (item[1].get("ms", float("inf")), item[0])):
        between = f" ({row['quartiles']})" if row.get("quartiles") else ""
        over = row.get("over_muon")
        rows.append([name, number(row.get("ms")) + between, ABSENT if over is None else f"{over:.2f}", *stamp(run)])
    return rows


def monitor(run: Run) -> list[Row]:
    rows = []
    for name, row in run.get("quantities", {}).items():
        own = [a - b for a, b in zip(row.get("measured", ()), row.get("plain", ()), strict=False)]
        share = row.get("share")
        cost = number(row["cost_ms"]) + quartiles(own) if "cost_ms" in row else ABSENT
        cells = [name + (" (one matrix)" if row.get("one_matrix") else ""), spread(row.get("plain")), cost]
        rows.append([*cells, ABSENT if share is None else f"{100 * share:.2f} %", str(run.get("every", ABSENT)), *stamp(run)])
    return rows


TABLES = (
    Table(
        title="A step of Muon, on a CPU",
        files={"step_time.json": "run"},
        measured="Optimizers in turn on copies of the same fp32 matrices of GPT-2-small layers; milliseconds of one step, over "
        "the median of `schatten.Muon`; the band of singular values of one update divided by lr, of those above 1e-2 of the "
        "gradient's norm; and ||D D^T - I||_F / sqrt(768) of a Gaussian gradient.",
        command="python benchmarks/step_time.py --peers",
        columns=("optimizer", "ms", "over schatten.Muon", "band", "orthogonality error", *STAMP),
        rows=step_time,
    ),
    Table(
        title="Memory of a step, on a CPU",
        files={"step_time.json": "run"},
        measured="What the step of all hidden matrices of GPT-2 small allocates at its peak beside state and gradients, from "
        "the profiler's memory events, and over its largest batch of one shape.",
        command="python benchmarks/step_time.py",
        columns=("max_batch_bytes", "peak, MiB", "over the largest batch", *STAMP),
        rows=step_memory,
    ),
    Table(
        title="Directions, on a CPU",
        files={"solvers.json": "run"},
        measured="Every solver in turn on the same fp32 matrices of GPT-2-small layers; milliseconds of one direction, over "
        "Muon's own with products in the same precision; the worst relative error on singular values in [1e-3, 1] of the "
        "largest, and the relative Frobenius error on Gaussian matrices.",
        command="python benchmarks/solvers.py",
        columns=("direction", "ms", "ratio", "to that of", "worst error", "on Gaussian", *STAMP),
        rows=solvers,
    ),
    Table(
        title="Presets, on a CPU",
        files={"optimizers.json": "run"},
        measured="The step of every preset with its defaults, in turn, on the fp32 matrices of a small transformer.",
        command="python benchmarks/optimizers.py",
        columns=("preset", "ms", "over Muon", *STAMP),
        rows=presets,
    ),
    Table(
        title="What a monitor costs",
        files={"monitor.json": "run"},
        measured="A training step of the demo model without a monitor, what a measurement adds to its median, in milliseconds "
        "of processor time, and its share of all steps where one in `every` is measured.",
        command="python benchmarks/monitor.py",
        columns=("quantities", "step, ms", "measurement, ms", "share", "every", *STAMP),
        rows=monitor,
    ),
)
