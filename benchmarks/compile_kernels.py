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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import common
import triton
from compile_parts.examples import STEP, examples
from compile_parts.launches import CHOSEN, FIRST, PROCESSORS, SEARCHED, compiling
from compile_parts.varieties import Variety, row, saved, variety

TARGETS = tuple(PROCESSORS)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="ten times the compute capability")
    parser.add_argument("--only", nargs="+", default=[""], help="examples whose names begin with one of these")
    parser.add_argument("--first", action="store_true", help="of tiles to choose from compile the first candidate alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compile_kernels.json"))
    args = parser.parse_args()
    if unknown := [target for target in args.targets if target not in TARGETS]:
        parser.error(f"--targets takes {', '.join(map(str, TARGETS))}, got {unknown[0]}")
    chosen = {name: launch for name, launch in examples().items() if name.startswith(tuple(args.only))}
    if not chosen:
        known = sorted({name.split()[0].strip(",") for name in examples()})
        parser.error(f"--only takes beginnings such as {', '.join(known)}, got {', '.join(args.only)}")
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
