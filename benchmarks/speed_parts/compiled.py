"""Tables of benchmarks/compile_kernels.py: what kernels need on GPUs they were compiled for, and what a first step compiles."""

from collections.abc import Sequence
from typing import Any

from benchmarks.speed_parts.table import ABSENT, STAMP, Row, Run, Table, number, stamp

FILES = {"compile_kernels.json": "run"}
COMMAND = "python benchmarks/compile_kernels.py"


def stamped(run: Run) -> Row:
    """Nothing ran on a GPU; the compiler counts beside torch."""
    _, torch, commit = stamp(run)
    return ["none: compiled alone", f"{torch}, triton {run.get('triton', ABSENT)}", commit]


def kernels(run: Run) -> list[Row]:
    alike: dict[tuple[int, str], list[Run]] = {}
    for variety in run.get("varieties", []):
        alike.setdefault((variety.get("target", 0), variety.get("kernel", ABSENT)), []).append(variety)
    rows = []
    for (target, kernel), own in sorted(alike.items()):
        cores = sorted({v["tensor_cores"] for v in own if v.get("tensor_cores")})
        cells = [_capability(target), kernel, str(len(own)), _range(own, "registers"), _range(own, "shared", 1 / 1024)]
        cells += [_range(own, "local"), ", ".join(cores) or ABSENT, _range(own, "seconds", digits=2)]
        rows.append([*cells, *stamped(run)])
    return rows


def _capability(target: int | str) -> str:
    """Ten times the compute capability, as NVIDIA writes it."""
    return f"{int(target) / 10:.1f}"


def _range(varieties: Sequence[Run], key: str, factor: float = 1, digits: int = 0) -> str:
    """The smallest and the largest, or the one that all have."""
    found: list[Any] = [factor * v[key] for v in varieties if key in v]
    ends = dict.fromkeys(f"{of(found):.{digits}f}" for of in (min, max)) if found else {ABSENT: None}
    return " - ".join(ends)


def first_step(run: Run) -> list[Row]:
    rows = []
    for target, cost in sorted(run.get("first_step", {}).items()):
        for name, said in (("first", "the first candidate of each"), ("search", "all candidates, for a search")):
            count = cost.get(f"{name}_varieties")
            cells = [
                _capability(target.removeprefix("sm_")),
                said,
                ABSENT if count is None else str(count),
                number(cost.get(f"{name}_seconds")),
            ]
            rows.append([*cells, *stamped(run)])
    return rows


TABLES = (
    Table(
        title="What a first step compiles",
        files=FILES,
        measured="The kernels of the first step of Muon on GPT-2 small, compiled one after another without a GPU, in seconds "
        "of the processor that the command ran on.",
        command=COMMAND,
        columns=("capability", "tiles", "kernels", "s", *STAMP),
        rows=first_step,
    ),
    Table(
        title="What the kernels need",
        files=FILES,
        measured="Every variety of a kernel that products, passes and steps launch, compiled for GPUs that are not here: "
        "registers of a thread, KiB of shared memory of a block, bytes a thread keeps in local memory (0: no register is "
        "spilled), the tensor cores' instruction, and seconds to compile; smallest and largest.",
        command=COMMAND,
        columns=(
            *(
                "capability",
                "kernel",
                "varieties",
                "registers",
                "shared, KiB",
                "local, bytes",
                "tensor cores",
                "compiled in, s",
            ),
            *STAMP,
        ),
        rows=kernels,
    ),
)
