"""The step-time table: optimizer steps on the parameters of real models, against each other and against the hardware.

    python benchmarks/gpu.py [--models resnet18,gpt2,llama-1b,llama-8b,experts] [--rounds 15] [--peers] [--quick] [--out FILE]

One process. Contenders alternate on the same weights and gradients (random, one copy), each with its own state. Where the
states of all do not fit beside each other, each steps alone, twice, the second time in reverse order. Peers join in the second
half of the rounds, as some compile for a minute. Prints a table for each model and writes all to benchmarks/results/gpu.json
after each; other models that an earlier run on the same device and torch left there stay. An interrupt or a SIGTERM ends the
run with the rows it has. Without a CUDA device the models are narrow, the kernels eager, the clock is the wall's, and the file
is gpu_cpu.json.

Contenders: torch's fused AdamW on all parameters; torch.optim.Muon and peers (`--peers`: gram_newton_schulz, heavyball,
pytorch_optimizer, as installed) on the same logical matrices as two-dimensional parameters, views of the same memory, with
fused AdamW on the rest; schatten.Muon on the parameters as they are, in groups as `schatten.plan` makes them, with eager
kernels, Triton's, and a CUDA graph of the latter (lr on the device); schatten.SpectralSGD(p=0.5). All have their defaults,
but lr 1e-3. A peer that fails is a row with its error. Gradients keep their addresses from step to step, as they do in
training once the allocator has settled.

What the JSON holds. All keys are always there, `null` where nothing was measured; times are milliseconds of one step.

    benchmark         "gpu"
    device            "cuda" or "cpu"
    quick             true: narrow models, nothing to conclude from
    machine           of the last run: name, capability ("9.0"), memory_bytes, multiprocessors, driver, torch, triton, cuda,
                      python, cores, threads, working_dtype
    models            {key: model}, in the order of --models' default; of each:
      title, dtype    dtype is that of parameters and gradients: "float32" or "bfloat16"
      commit, seconds the commit it was measured at, and how long it took
      stopped         true: interrupted or terminated, so that some rows have few rounds, or none and an error
      together        true: contenders alternate round by round; false: each steps alone, twice
      tensors, parameters, matrix_parameters
      matrices        [{count, fan_out, fan_in}], logical matrices
      ceilings        {"before": c, "after": c}; c: dtype, products [{side, teraflops}], peak_teraflops,
                      copy_gigabytes_per_second (read and written), clocks ({name: text} of nvidia-smi right after, or null)
      peak_teraflops, bandwidth_gigabytes_per_second      the better of before and after
      plain_flops     of five plain Newton-Schulz steps on all matrices
      floors          {task: {bytes, flops_whole, flops_symmetric, milliseconds_whole, milliseconds_symmetric}} for the tasks
                      "adamw", "muon", "power"
      reference       the row that `over_reference` compares with: schatten.Muon on Triton, on a CPU eager
      rows            {contender: row}, of each:
        task          "adamw", "muon" or "power": which floor it is held against
        ours, peer    true for schatten's; true for those of --peers
        note          what differs, such as the precision of state; may be ""
        error         null, or "Type: first line of the message"; then all that follows is null
        milliseconds  {median, low, high, all}: quartiles and every round; between CUDA events (on a CPU the wall clock)
        wall_milliseconds, host_milliseconds    medians; host: until step() returns on an idle device
        steps_per_round
        over_adamw, over_reference              ratios of medians
        over_floor_symmetric, over_floor_whole  median / floor
        effective_teraflops, effective_over_peak    plain_flops / median, for "muon" and "power"
        extra_bytes   peak memory of a step beyond what was allocated before it; of a graph, while it was captured
        max_batch_bytes   of schatten's
    first_step        null, or {model, kernels, cold, warm}: seconds in a fresh process with empty and with filled caches, each
                      {first_seconds, second_seconds, error}
    targets           [{target, contender, model, measured, limit, met, at_floor}], empty on a CPU; `limit` is text such as
                      ">= 4"; at_floor: what a step of schatten's at its floor (symmetric) would reach, or null

`contender` is one of "torch.optim.AdamW, fused", "torch.optim.Muon", "schatten.Muon, eager", "schatten.Muon, Triton",
"schatten.Muon, CUDA graph", "schatten.SpectralSGD(p=0.5)", "gram_newton_schulz.Muon", "heavyball.Muon",
"pytorch_optimizer.Muon", "pytorch_optimizer.Muon, Gram".
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from gpu_parts import report, timing, turns
from gpu_parts.contenders import contenders
from gpu_parts.first_step import MODEL, first_step
from gpu_parts.models import MODELS, Parameters

from schatten.solvers.core import working_dtype

RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def machine(here: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_properties(here) if here.type == "cuda" else None
    clocks = timing.clocks(here)
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        "name": gpu.name if gpu else platform.processor() or platform.machine(),
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "memory_bytes": gpu.total_memory if gpu else None,
        "multiprocessors": gpu.multi_processor_count if gpu else None,
        "driver": clocks and clocks["driver_version"],
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "working_dtype": str(working_dtype(torch.zeros(1, device=here), "auto")).removeprefix("torch."),
    }


def ceilings(here: torch.device, quick: bool) -> dict[str, Any]:
    turns.free(here)
    found = {**timing.ceilings(here, quick), "clocks": timing.clocks(here)}
    turns.free(here)
    return found


def measured(key: str, rounds: int, peers: bool, quick: bool, here: torch.device) -> dict[str, Any]:
    """The JSON's entry of one model."""
    began = time.perf_counter()
    before = ceilings(here, quick)
    model = MODELS[key](quick, torch.cuda.mem_get_info(here)[0] if here.type == "cuda" else 0)
    print(model.title, flush=True)
    parameters = Parameters(model, here)
    found = contenders(here, model.dtype, peers)
    together = turns.fits(model, found, here)
    records, stopped = turns.measured(found, parameters, rounds, here, together)
    del parameters
    if peers:
        torch.compiler.reset()
    after = ceilings(here, quick)
    known = report.floors(model, (before, after), working_dtype(torch.zeros(1, device=here), "auto"))
    return {
        **report.described(model),
        "commit": common.commit(),
        "seconds": time.perf_counter() - began,
        "stopped": stopped,
        "together": together,
        "ceilings": {"before": before, "after": after},
        **known,
        **report.rows(found, records, known),
    }


def earlier(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`models` and `first_step` of a run on the same device and torch, to be brought up to date."""
    if not out.exists():
        return {}
    known = json.loads(out.read_text())
    same = all(known.get(key) == result[key] for key in ("device", "quick")) and all(
        known["machine"][key] == result["machine"][key] for key in ("name", "torch", "triton")
    )
    return {key: known[key] for key in ("models", "first_step")} if same else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a contender that is no peer failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="some of these, with commas between them")
    parser.add_argument("--rounds", type=int, default=15, help="at most; fewer of a model whose steps are long")
    parser.add_argument("--peers", action="store_true", help="other packages too")
    parser.add_argument("--quick", action="store_true", help="narrow models, as on a CPU in any case")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    keys = args.models.split(",")
    if unknown := [key for key in keys if key not in MODELS]:
        parser.error(f"--models takes {', '.join(MODELS)}, got {', '.join(unknown)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    here = device()
    quick = args.quick or here.type == "cpu"
    out = args.out or RESULTS / ("gpu.json" if here.type == "cuda" else "gpu_cpu.json")
    result: dict[str, Any] = {"benchmark": "gpu", "device": here.type, "quick": quick, "machine": machine(here)}
    result |= {"models": {}, "first_step": None, "targets": [], **earlier(out, result)}
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{result['machine']['name']}, torch {torch.__version__}, commit {common.commit() or 'unknown'}", flush=True)

    def save() -> None:
        result["models"] = {key: result["models"][key] for key in MODELS if key in result["models"]}
        if here.type == "cuda":
            result["targets"] = report.targets(result["models"], result["first_step"])
        out.write_text(json.dumps(result, indent=1) + "\n")

    failed = []
    for key in keys:
        result["models"][key] = entry = measured(key, args.rounds, args.peers, quick, here)
        save()
        print(f"{report.table(entry, quick)}\n  {entry['seconds']:.0f} s\n", flush=True)
        failed += [f"{name} on {key}" for name, row in entry["rows"].items() if row["error"] and not row["peer"]]
        if entry["stopped"]:
            print(f"stopped; written to {out}")
            return 1
    if MODEL in keys:
        result["first_step"] = first_step(here, quick)
        save()
        for cache in ("cold", "warm"):
            told = result["first_step"][cache]
            seconds = told["error"] or f"{told['first_seconds']:.2f} s, the second {told['second_seconds']:.3f} s"
            print(f"first step of {MODEL}, caches {cache}: {seconds}", flush=True)
    if result["targets"]:
        print(f"targets\n{report.verdicts(result['targets'])}")
    print(f"written to {out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    # What ends a run from outside leaves the rows it has, as an interrupt does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
