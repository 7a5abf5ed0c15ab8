"""Compile Triton's kernels for GPUs that are not here, as they would be launched, and look at the machine code.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --targets 90 --only affine

The library launches its kernels itself, on CPU tensors, under a driver that stands for the GPU: every launch compiles and
none runs, so each variety is one that is launched, with its types, alignments and constants. Where a launch would search for
the fastest tiles, all candidates are compiled.

Prints a row for each variety: registers of a thread, KiB of shared memory of a block, warps that a multiprocessor holds at a
time, bytes a thread keeps in local memory (0 unless registers are spilled or an array is indexed at run time), the tensor
cores' instruction, bytes of a thread's widest load and store, seconds of processor time to compile. Then what the first step
of Muon on GPT-2 small compiles. The JSON has besides how many loads and stores of each width there are, and which launches
need a variety.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# The interpreter is chosen when kernels are defined.
os.environ.pop("TRITON_INTERPRET", None)

import common
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import schatten
import schatten.kernels.triton as ours
from schatten import batching
from schatten.kernels import Bucket, Onto, Tables, choice
from schatten.kernels.triton import tuning
from schatten.kernels.triton.product import affine_onto
from schatten.lab.models import GPT, GPTConfig

TARGETS = (80, 90, 100)
# Multiprocessors of an A100, H100 and B200; of each one, registers, warps and KiB of shared memory, of which each block takes
# one more than it asks for (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
PROCESSORS = {80: 108, 90: 132, 100: 148}
REGISTERS, WARPS, SHARED = 65536, 64, {80: 164, 90: 228, 100: 228}
TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# A variety is needed if the first candidate is taken, or if all are tried, or if another turns out the fastest.
FIRST, SEARCHED, CHOSEN = range(3)
STEP = "the first step of Muon on GPT-2 small"

ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.([\w.]+)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Absent:
    """The driver of a GPU that is not here. Its number is its capability, because kernels are kept for each device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiled:
    """A kernel that was compiled, seconds it took, and the launches that need it with when: FIRST, SEARCHED or CHOSEN."""

    kernel: Any
    seconds: float
    examples: dict[str, int] = field(default_factory=dict)


@dataclass
class Variety:
    """A kernel compiled for one combination of types, alignments, constants and options, and what became of it."""

    kernel: str
    target: int
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    capped: int | None
    registers: int
    shared: int
    local: int
    tensor_cores: str
    loads: dict[int, int]
    stores: dict[int, int]
    seconds: float
    examples: dict[str, int]

    @property
    def resident(self) -> int:
        """Warps that a multiprocessor holds at a time; 0 if not even one block has room."""
        threads, registers = 32 * self.warps, -(-self.registers // 8) * 8
        room = SHARED[self.target]
        blocks = min(REGISTERS // (registers * threads), WARPS // self.warps, int(room // (self.shared / 1024 + 1)))
        return self.warps * blocks

    def configuration(self) -> str:
        """Types of what is read and written, and the constants written in capitals, flags by their names alone."""
        shown = [f"{v}" for v in dict.fromkeys(t.removesuffix(":16") for t in self.types.values() if t.startswith("*"))]
        for name, value in self.constants.items():
            if name.isupper() and value is not None and value is not False:
                shown.append(name if value is True else f"{name}={value}")
        capped = f" registers<={self.capped}" if self.capped else ""
        return " ".join((*shown, f"warps={self.warps}", f"stages={self.stages}")) + capped


class Launches:
    """What is launched: each variety once, in `made`, by its kernel."""

    def __init__(self, search: bool) -> None:
        self.search = search
        self.made: dict[Any, Compiled] = {}
        self._example = ""
        # The candidate that a search finds fastest, and the longest list there was to search.
        self._fastest = self._most = 0
        self._trying = False

    def of(self, example: str, launch: Callable[[], object]) -> None:
        """Launch once for each candidate that may be the fastest."""
        self._example, self._fastest, self._most = example, 0, 1
        while self._fastest < self._most:
            launch()
            self._fastest += 1

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """In place of `JITFunction.run`."""
        start = processor_time()
        kernel = _RUN(function, *args, grid=grid, warmup=True, **options)
        seconds = processor_time() - start
        found = self.made.setdefault(kernel, Compiled(kernel, seconds))
        part = CHOSEN if self._fastest else SEARCHED if self._trying else FIRST
        found.examples[self._example] = min(part, found.examples.get(self._example, part))
        return kernel

    def choose(
        self, kernel: str, key: tuple[Any, ...], candidates: Sequence[Any], run: Callable[[Any], None], device: torch.device
    ) -> Any:
        """In place of `tuning.choose`."""
        if not self.search:
            return candidates[0]
        self._most = max(self._most, len(candidates))
        if self._fastest:
            return candidates[min(self._fastest, len(candidates) - 1)]
        self._trying = True
        for candidate in candidates if len(candidates) > 1 else ():
            run(candidate)
        self._trying = False
        return candidates[0]


_RUN = JITFunction.run


def processor_time() -> float:
    """Seconds of this process and of those it waited for, as the assembler, on a machine that may be busy with others."""
    return sum(os.times()[:4])


@contextmanager
def compiling(capability: int, search: bool = True) -> Iterator[Launches]:
    """Inside the block launches compile for `capability`, ten times the compute capability, and run nothing.

    With `search` they compile all candidates, otherwise the first.
    """
    launches = Launches(search)
    with ExitStack() as changes:
        # What other days compiled would take no time.
        cache = changes.enter_context(tempfile.TemporaryDirectory())
        changes.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))

        def change(of: Any, name: str, value: Any) -> None:
            changes.enter_context(mock.patch.object(of, name, value))

        # Restored as it was: to reset it is to look for a GPU.
        changes.enter_context(mock.patch.dict(vars(driver)))
        driver.set_active(Absent(capability))  # type: ignore[arg-type]
        change(JITFunction, "run", lambda function, *args, **options: launches.run(function, *args, **options))
        change(choice, "lacking", lambda device, name=None: "asked for" if (name or choice._name.get()) == "eager" else "")
        processors = SimpleNamespace(major=capability // 10, multi_processor_count=PROCESSORS[capability])
        change(torch.cuda, "get_device_properties", lambda _: processors)
        theirs = tuning.choose
        own = [module for name, module in sys.modules.items() if name.startswith("schatten.kernels.triton.")]
        for module in own:
            if getattr(module, "choose", None) is theirs:
                change(module, "choose", launches.choose)
        # What is remembered of a device is that of another one.
        for remembered in {f for module in own for f in vars(module).values() if hasattr(f, "cache_clear")}:
            remembered.cache_clear()
            changes.callback(remembered.cache_clear)
        yield launches


def variety(compiled: Compiled) -> Variety:
    source, metadata = compiled.kernel.src, compiled.kernel.metadata
    names = source.fn.arg_names
    aligned = {path[0] for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    types = {
        name: f"{kind}:16" if i in aligned else kind
        for i, (name, kind) in enumerate(source.signature.items())
        if kind != "constexpr"
    }
    constants = {names[path[0]]: _plain(value) for path, value in source.constants.items()}
    return Variety(
        source.fn.__name__,
        metadata.target.arch,
        types,
        constants,
        metadata.num_warps,
        metadata.num_stages,
        metadata.maxnreg,
        shared=metadata.shared,
        seconds=compiled.seconds,
        examples=compiled.examples,
        **machine_code(compiled.kernel.asm["cubin"]),
    )


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def machine_code(cubin: bytes) -> dict[str, Any]:
    """What the machine code says: registers, local memory, tensor cores, and global loads and stores by their bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        use = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True)
        code = subprocess.run([knobs.nvidia.nvdisasm.path, file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", use.stdout)}
    widths: dict[str, Counter[int]] = {"loads": Counter(), "stores": Counter()}
    for name, kind in ACCESS.findall(code):
        width = next((WIDTHS[part] for part in kind.split(".") if part in WIDTHS), 4)
        widths["stores" if name == "STG" else "loads"][width] += 1
    cores = next((name for name in TENSOR_CORES if re.search(rf"\b{name}\b", code)), "")
    return {
        "registers": numbers["REG"],
        "local": numbers["STACK"] + numbers["LOCAL"],
        "tensor_cores": cores,
        **{k: dict(v) for k, v in widths.items()},
    }


def products(dtype: torch.dtype, *, all_forms: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a launch for each way a step calls the products; with `all_forms` not of wide matrices alone."""
    forms = {
        "": torch.empty(4, 768, 3072, dtype=dtype),
        " of transposed": torch.empty(4, 3072, 768, dtype=dtype).mT,
        " of odd sizes": torch.empty(3, 77, 333, dtype=dtype),
    }
    for name, X in forms.items() if all_forms else [("", forms[""])]:
        b, m, n = X.shape
        A, weight = X.new_empty(b, m, m), torch.empty(b, 1, 1)
        square, total = A.float(), torch.empty_strided(X.shape, X.stride())
        yield f"gram{name}", partial(ours.gram, X)
        yield f"sym{name}", partial(ours.sym, A, A, A, 1.5, 0.5)
        yield f"sym{name} into a sum", partial(ours.sym, A, A, A, 1.5, 0.5, total=square, weight=0.25)
        yield f"sym{name} into a sum by tensors", partial(ours.sym, A, A, A, 1.5, 0.5, total=square, weight=weight)
        yield f"affine{name}", partial(ours.affine, A, X, 1.5)
        yield f"affine{name} alone", partial(ours.affine, A, X, 0.0)
        yield f"affine{name} into a sum", partial(ours.affine, A, X, 1.5, total=total, weight=0.25)
        for kind, onto in ontos((1, m, n), b).items():
            yield f"affine{name} onto {kind}", partial(affine_onto, A, X, 1.5, onto=onto)


def ontos(shape: tuple[int, int, int], members: int) -> dict[str, Onto]:
    """Weights, in rows and in columns, in the ways that a step changes them."""
    blocks, m, n = shape
    row, column = (m * n, n, 1), (m * n, 1, m)

    def bucket(dtype: torch.dtype, strides: tuple[int, int, int] = row) -> Bucket:
        return Bucket([torch.empty(blocks, m, n, dtype=dtype) for _ in range(members)], shape, strides)

    number = torch.tensor(1e-3)
    finite = [torch.tensor(True) for _ in range(members)]
    noise = [(torch.tensor(1.0), i) for i in range(members)]
    return {
        "fp32": Onto(bucket(torch.float32), 0.9, 1e-3, finite),
        "fp32 in columns": Onto(bucket(torch.float32, column), 0.9, 1e-3, finite),
        "fp32 by tensors": Onto(bucket(torch.float32), number, number, finite),
        "bf16": Onto(bucket(torch.bfloat16), 0.9, 1e-3, finite),
        "bf16 by noise": Onto(bucket(torch.bfloat16), 0.9, 1e-3, finite, noise),
    }


def passes(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for passes over gradients, averages and weights."""
    b, m, n = 4, 3072, 768
    tables, finite = Tables(), [torch.tensor(True) for _ in range(b)]
    G, M = ([torch.empty(m, n, dtype=of) for _ in range(b)] for of in (dtype, torch.float32))
    for name, wide in (("momentum", False), ("momentum transposed", True)):
        yield (
            name,
            partial(
                ours.momentum_,
                *(Bucket(of, (1, m, n), (m * n, n, 1)) for of in (G, M)),
                finite,
                beta=0.95,
                form="ema",
                nesterov=True,
                scale=None,
                maximize=False,
                dtype=dtype,
                wide=wide,
                tables=tables,
            ),
        )
    S = torch.empty(b, m, n, dtype=dtype)
    yield "quotient", partial(ours.quotient, S, torch.empty(b, 1, 1), dtype)
    yield "quotient of transposed", partial(ours.quotient, S.mT, torch.empty(b, 1, 1), dtype)
    for kind, onto in ontos((1, m, n), b).items():
        yield f"retract onto {kind}", partial(ours.retract_, S, onto)
    steps = [torch.tensor(1.0) for _ in range(b)]
    V = [torch.empty(m, n) for _ in range(b)]
    for name, noise in (("adamw", None), ("adamw by noise", [(step, i) for i, step in enumerate(steps)])):
        if noise is None or dtype == torch.bfloat16:
            yield (
                name,
                partial(
                    ours.adamw_,
                    *([torch.empty(m, n, dtype=dtype) for _ in range(b)], G, M, V, steps, finite),
                    lr=1e-3,
                    beta1=0.9,
                    beta2=0.95,
                    eps=1e-8,
                    weight_decay=0.1,
                    maximize=False,
                    scale=None,
                    noise=noise,
                    tables=tables,
                ),
            )


def gpt2_step() -> None:
    """The first step of Muon on GPT-2 small with fp32 weights, multiplied in bf16."""
    model = GPT(GPTConfig(vocabulary=50304, layers=12, heads=12, width=768, context=1024))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    solver = schatten.solvers.polynomial(dtype="bfloat16")
    # As much memory as on a GPU: how many matrices go together is a number that varieties are compiled for.
    optimizer = schatten.Muon(model, lr=6e-4, solver=solver, max_batch_bytes=batching.MAX_GPU_BATCH_BYTES)
    optimizer.step()


def at_precision(name: str, launch: Callable[[], object]) -> None:
    """Launch with torch told to multiply fp32 at this precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        launch()
    finally:
        torch.set_float32_matmul_precision(before)


def examples() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {STEP: gpt2_step}
    for name, dtype in DTYPES.items():
        for kind, launch in (*products(dtype, all_forms=name == "bf16"), *(() if name == "tf32" else passes(dtype))):
            found[f"{kind}, {name}"] = partial(at_precision, "high" if name == "tf32" else "highest", launch)
    return found


def varieties(capability: int, chosen: Mapping[str, Callable[[], object]], search: bool) -> list[Variety]:
    """Every variety that the chosen examples launch."""
    with compiling(capability, search) as launches:
        for name, launch in chosen.items():
            launches.of(name, launch)
    return [variety(compiled) for compiled in launches.made.values()]


def first_step(found: Sequence[Variety], search: bool) -> dict[str, float]:
    """How many varieties the example STEP needs and the seconds they took: by the first candidates, and if it searches."""
    cost: dict[str, float] = {}
    for name, last in (("first", FIRST), ("search", SEARCHED)) if search else (("first", FIRST),):
        own = [v.seconds for v in found if v.examples.get(STEP, CHOSEN) <= last]
        cost |= {f"{name}_varieties": len(own), f"{name}_seconds": sum(own)}
    return cost


def row(v: Variety) -> str:
    return (
        f"{v.target:4d} {v.kernel:11} {v.registers:4d} {v.shared / 1024:7.1f} {v.resident:5d} {v.local:5d} "
        f"{v.tensor_cores or 'none':8} {max(v.loads, default=0):3d} {max(v.stores, default=0):3d} {v.seconds:6.2f}  "
        f"{v.configuration()}"
    )


def saved(v: Variety) -> dict[str, Any]:
    """What the JSON says of a variety, in few lines: there are hundreds."""
    rest = {name: value for name, value in asdict(v).items() if name not in ("types", "constants", "examples")}
    text = {"configuration": v.configuration(), "types": ", ".join(f"{name} {kind}" for name, kind in v.types.items())}
    return {**text, "resident": v.resident, **rest, "examples": "; ".join(v.examples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="ten times the compute capability")
    parser.add_argument("--only", nargs="+", default=[""], help="examples whose names begin with one of these")
    parser.add_argument("--first", action="store_true", help="of tiles to choose from compile the first candidate alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compile_kernels.json"))
    args = parser.parse_args()
    chosen = {name: launch for name, launch in examples().items() if name.startswith(tuple(args.only))}
    found, step = [], {}
    print("  sm kernel      regs  shared warps local cores   load store seconds  configuration")
    for capability in args.targets:
        own = varieties(capability, chosen, not args.first)
        for v in own:
            print(row(v))
        found += own
        if STEP in chosen:
            step[f"sm_{capability}"] = cost = first_step(own, not args.first)
            text = f"{STEP} on sm_{capability} compiles {cost['first_varieties']} varieties in {cost['first_seconds']:.1f} s"
            if not args.first:
                text += f", {cost['search_varieties']} in {cost['search_seconds']:.1f} s if it searches for the fastest tiles"
            print(text)
    result = {"triton": triton.__version__, "device": "none", "first_step": step, "varieties": [saved(v) for v in found]}
    common.save(args.out, "compile_kernels", result)


if __name__ == "__main__":
    main()
