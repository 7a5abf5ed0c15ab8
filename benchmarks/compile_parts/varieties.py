"""What became of a kernel compiled for one combination of types, alignments, constants and options: its machine code."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from compile_parts.launches import Compiled
from triton import knobs

# Of each multiprocessor: registers, warps and KiB of shared memory, of which each block takes one more than it asks for (CUDA
# C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS, WARPS, SHARED = 65536, 64, {80: 164, 90: 228, 100: 228}
TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA")

ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)\.([\w.]+)")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


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
