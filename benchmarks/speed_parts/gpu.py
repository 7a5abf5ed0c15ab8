"""Tables of benchmarks/gpu.py: steps against each other and against the hardware, what that can do, first steps, targets."""

from collections.abc import Iterator

from benchmarks.speed_parts.table import ABSENT, STAMP, Row, Run, Table, mebibytes, number, stamp

FILES = {"gpu.json": "GPU run", "gpu_cpu.json": "CPU run"}
COMMAND = "python benchmarks/gpu.py"


def stamped(run: Run, model: Run) -> Row:
    """The machine of a run, the commit of one of its models."""
    machine = run.get("machine", {})
    kind = run.get("device", "cpu")
    own = {"machine": machine.get("name", ""), "device": kind if kind == "cpu" else machine.get("name", kind)}
    return stamp({**machine, **own, "commit": model.get("commit")})


def models(run: Run) -> Iterator[tuple[str, Run]]:
    """Each model with its title, which says where it is a narrow one."""
    for key, model in run.get("models", {}).items():
        yield title(run, key), model


def title(run: Run, key: str) -> str:
    return run.get("models", {}).get(key, {}).get("title", key) + (" (narrow)" if run.get("quick") else "")


def times(found: Run | None) -> str:
    if not found or "median" not in found:
        return ABSENT
    between = f" ({number(found['low'])} - {number(found['high'])})" if "low" in found and "high" in found else ""
    return number(found["median"]) + between


def steps(run: Run) -> list[Row]:
    rows = []
    for title, model in models(run):
        for name, row in model.get("rows", {}).items():
            if row.get("error"):
                measured = [f"failed: {row['error']}", *[ABSENT] * 8]
            else:
                ratios = ("over_adamw", "over_reference", "over_floor_symmetric", "over_floor_whole")
                measured = [times(row.get("milliseconds")), number(row.get("host_milliseconds"))]
                measured += [number(row.get(key)) for key in (*ratios, "effective_teraflops", "effective_over_peak")]
                measured.append(mebibytes(row.get("extra_bytes")))
            note = f" ({row['note']})" if row.get("note") else ""
            rows.append([title, model.get("dtype", ABSENT), name + note, *measured, *stamped(run, model)])
    return rows


def hardware(run: Run) -> list[Row]:
    rows = []
    for title, model in models(run):
        floors = model.get("floors", {})
        least = [_floor(floors.get(task, {})) for task in ("adamw", "muon", "power")]
        rates = [number(model.get(key)) for key in ("peak_teraflops", "bandwidth_gigabytes_per_second")]
        clocks = model.get("ceilings", {}).get("after", {})
        said = ", ".join(f"{name} {text}" for name, text in clocks.get("clocks", {}).items())
        rows.append([title, *rates, said or ABSENT, *least, *stamped(run, model)])
    return rows


def _floor(task: Run) -> str:
    whole, symmetric = (task.get(f"milliseconds_{kind}") for kind in ("whole", "symmetric"))
    return number(symmetric) if whole == symmetric else f"{number(symmetric)}, {number(whole)}"


def first_steps(run: Run) -> list[Row]:
    found = run.get("first_step")
    if not found:
        return []
    models = run.get("models", {})
    own = stamped(run, models.get(found.get("model"), {}))
    rows = []
    for name, said in (("cold", "empty"), ("warm", "filled")):
        row = found.get(name, {})
        error = [f"failed: {row['error']}", ABSENT] if row.get("error") else None
        cells = error or [number(row.get("first_seconds")), _milliseconds(row.get("second_seconds"))]
        rows.append([title(run, found.get("model", ABSENT)), found.get("kernels", ABSENT), said, *cells, *own])
    return rows


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)


def targets(run: Run) -> list[Row]:
    rows = []
    for row in run.get("targets", []):
        model = run.get("models", {}).get(row.get("model"), {})
        met = {True: "yes", False: "no"}.get(row.get("met"), ABSENT)
        words = [row.get("target", ABSENT), row.get("contender", ABSENT), title(run, row.get("model", ABSENT))]
        rows.append([*words, number(row.get("measured")), row.get("limit", ABSENT), met, *stamped(run, model)])
    return rows


TABLES = (
    Table(
        title="A step of whole models",
        files=FILES,
        measured="Optimizers in turn on the parameters of one model: milliseconds of a step and until `step()` returns; the "
        "median over that of torch's fused AdamW, of `schatten.Muon` with the device's kernels, and of the floor, the least "
        "time that the bytes and products of a step take at the rates measured in the same run, with symmetric products "
        "counted by half and whole; TFLOP/s in the products of five plain Newton-Schulz steps, and over the measured peak; and "
        "what a step allocates at its peak. A CPU's run is of narrow models: it shows that the script runs, and nothing else.",
        command=COMMAND,
        columns=(
            *("model", "dtype", "optimizer", "step, ms", "host, ms", "over AdamW", "over schatten.Muon"),
            *("over floor", "over floor, whole products", "TFLOP/s", "over peak", "extra, MiB", *STAMP),
        ),
        rows=steps,
    ),
    Table(
        title="What the hardware can do",
        files=FILES,
        measured="The rate of large matrix products and of copies, in bytes read and written, the better of before and after a "
        "model's steps; the clocks right after; and the floors of a step that follow, in milliseconds: with symmetric products "
        "counted by half, and whole.",
        command=COMMAND,
        columns=("model", "peak TFLOP/s", "copies, GB/s", "clocks", "floor of AdamW", "of Muon", "of p = 1/2", *STAMP),
        rows=hardware,
    ),
    Table(
        title="The first step",
        files=FILES,
        measured="The first two steps of `schatten.Muon` in a process of its own, with empty caches of compiled "
        "kernels and tile sizes, and with those filled.",
        command=COMMAND,
        columns=("model", "kernels", "caches", "first step, s", "second step, ms", *STAMP),
        rows=first_steps,
    ),
    Table(
        title="Targets",
        files={"gpu.json": "GPU run"},
        measured="What was asked of a GPU of the Hopper class before any was measured.",
        command=COMMAND,
        columns=("target", "optimizer", "model", "measured", "asked", "met", *STAMP),
        rows=targets,
    ),
)
