"""The optimizer step of schatten.Muon on 1 to 4 ranks of this machine, against what the cost model predicts.

    python benchmarks/scaling.py [--ranks 1,2,3,4] [--width 512] [--layers 3] [--rounds 15] [--out FILE.json]

Ranks are gloo processes of one thread each; with more ranks than cores they take turns. All ranks start a step together, and
placements take turns in every round. Times are of the slowest rank, medians over rounds: by the clock, with quartiles, and
on a core, which other programs on the machine do not change much. Predictions are `schatten plan --simulate`'s for a machine
whose rates the ranks have measured together (`schatten.lab.measure`), on a core too; they know nothing of the step itself.
A second table is the cross-over: square matrices of one size, computed by every rank or shared among them.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import schatten
from schatten.lab.measure import measured
from schatten.lab.mesh import Mesh
from schatten.lab.shares import WAITING
from schatten.lab.simulate import Simulation, simulate
from schatten.placements.cost import replicate, work
from schatten.placements.machine import Machine
from schatten.solvers.core import working_dtype

SIDES = (32, 64, 128, 256, 384, 512, 768)
EQUAL = 16  # matrices of each size

Step = Callable[[], object]


class Matrices(nn.Module):
    """Hidden Linears of these shapes."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=False) for fan_out, fan_in in shapes)


def layers(width: int, count: int) -> list[tuple[int, int]]:
    return count * (4 * [(width, width)] + [(4 * width, width), (width, 4 * width)])


def stepping(placement: str, shapes: list[tuple[int, int]], ranks: int) -> Step:
    """A step of matrices of these shapes, the same weights and gradients on every rank and for every placement."""
    torch.manual_seed(0)
    model = Matrices(shapes)
    gradients = [torch.randn(p.shape) for p in model.parameters()]
    if placement == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    for p, G in zip(model.parameters(), gradients, strict=True):
        p.grad = distribute_tensor(G, p.device_mesh, p.placements) if isinstance(p, DTensor) else G
    if placement == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True).step
    shared = placement if placement in ("owners", "zero1") else None
    return schatten.Muon(model.parameters(), placement=shared).step


def rounds_of(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the slowest rank, by the clock and on a core, placements taking turns, after one round of warm-up."""
    times: dict[str, dict[str, list[float]]] = {name: {"clock": [], "core": []} for name in steps}
    for repeat in range(rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            step()
            taken = 1e3 * torch.tensor([time.perf_counter() - start, time.process_time() - busy])
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if repeat > 0:
                for key, value in zip(times[name], taken.tolist(), strict=True):
                    times[name][key].append(value)
    return times


def predicted(placement: str, shapes: list[tuple[int, int]], ranks: int, machine: Machine) -> Simulation:
    mesh = {"owners": Mesh(replicate=ranks), "fsdp2": Mesh(shard=ranks)}.get(placement, Mesh())
    dtype = str(working_dtype(torch.empty(0), "auto")).removeprefix("torch.")
    return simulate(schatten.plan(Matrices(shapes)), mesh, schatten.Rule(), machine, dtype=dtype, device="cpu", owners=True)


def on_ranks(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), ranks)  # noqa: PTH118
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    machine = measured(clock=time.process_time)
    placements = ["local", "owners", "zero1", "fsdp2"] if ranks > 1 else ["local"]
    shapes = layers(args.width, args.layers)
    steps = {name: stepping(name, shapes, ranks) for name in [*placements, "adamw"]}
    times = rounds_of(steps, args.rounds)
    rows: dict[str, Any] = {name: {"milliseconds": taken} for name, taken in times.items()}
    for name in placements:
        dist.barrier()
        peak = torch.tensor(float(common.peak_bytes(steps[name])))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        rows[name]["peak"] = float(peak)
        if name != "zero1":
            model = predicted(name, shapes, ranks, machine)
            rows[name] |= {"predicted": on_a_core(model), "predicted peak": model.peak}
    rows["adamw"]["predicted"] = {"AdamW": 1e3 * predicted("local", shapes, ranks, machine).adamw_seconds}
    crossing = [] if ranks == 1 else [crossover(side, ranks, machine, args.rounds) for side in SIDES]
    if rank == 0:
        torch.save({"machine": asdict(machine), "placements": rows, "cross-over": crossing}, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_a_core(model: Simulation) -> dict[str, float]:
    """Milliseconds that a process is busy: waiting for other ranks is not, sending while something else is computed is."""
    return {name: 1e3 * seconds for name, seconds in model.seconds.items() if name != WAITING}


def crossover(side: int, ranks: int, machine: Machine, rounds: int) -> dict[str, Any]:
    """Square matrices computed by every rank, and shared."""
    shapes = EQUAL * [(side, side)]
    steps = {name: stepping(name, shapes, ranks) for name in ("local", "owners")}
    times = rounds_of(steps, rounds)
    dtype = str(working_dtype(torch.empty(0), "auto")).removeprefix("torch.")
    operations = work(schatten.Rule(), side, side, dtype).direction
    totals = {name: sum(on_a_core(predicted(name, shapes, ranks, machine)).values()) for name in steps}
    return {
        "side": side,
        "milliseconds": times,
        "predicted": totals,
        "replicate": replicate(operations, EQUAL, 4 * side * side, ranks, machine),
    }


def started(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """The result of `ranks` processes."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=on_ranks, args=(r, ranks, folder, args), daemon=True) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=args.timeout)
        hung = [p for p in processes if p.exitcode != 0]
        for process in processes:
            process.kill()
        if hung:
            raise RuntimeError(f"{len(hung)} of {ranks} ranks failed or took longer than {args.timeout} s.")
        return torch.load(Path(folder) / "result.pt")


def show(ranks: int, result: dict[str, Any]) -> None:
    machine = result["machine"]
    print(
        f"\n{ranks} ranks: {machine['flops'] / 1e9:.0f} GFLOP/s, {machine['memory_bandwidth'] / 1e9:.1f} GB/s of memory, "
        f"{machine['bandwidth'] / 1e9:.2f} GB/s and {1e3 * machine['latency']:.2f} ms for a collective"
    )
    print(
        f"{'placement':10}{'median ms':>10}{'quartiles':>18}{'on a core':>11}{'predicted':>11}{'peak MB':>9}{'predicted':>11}"
    )
    for name, row in result["placements"].items():
        clock, core = row["milliseconds"].values()
        line = f"{name:10}{common.median(clock):9.1f}{common.spread(clock):>18}{common.median(core):10.1f}"
        line += f"{sum(row['predicted'].values()):11.1f}" if "predicted" in row else " " * 11
        line += f"{row['peak'] / 1e6:9.1f}" if "peak" in row else ""
        print(line + (f"{row['predicted peak'] / 1e6:11.1f}" if "predicted peak" in row else ""))
    if result["cross-over"]:
        print(f"{EQUAL} matrices of side: shared over computed by every rank, by the clock, on a core, predicted")
    for row in result["cross-over"]:
        line = f"{row['side']:6}"
        for clock in ("clock", "core"):
            pairs = zip(row["milliseconds"]["owners"][clock], row["milliseconds"]["local"][clock], strict=True)
            ratios = [shared / alone for shared, alone in pairs]
            low, _, high = statistics.quantiles(ratios, n=4)
            line += f"{common.median(ratios):8.2f} ({low:.2f} - {high:.2f})"
        print(line + f"{row['predicted']['owners'] / row['predicted']['local']:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()
    found = {}
    for ranks in map(int, args.ranks.split(",")):
        found[str(ranks)] = started(ranks, args)
        show(ranks, found[str(ranks)])
    shapes = layers(args.width, args.layers)
    common.save(args.out, "scaling", {"shapes": shapes, "rounds": args.rounds, "ranks": found})


if __name__ == "__main__":
    main()
