"""What the benchmarks share: the matrices of GPT-2 small, alternating timings, and one way to save results."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from schatten.solvers.core import working_dtype


def matrices(layers: int) -> list[torch.Tensor]:
    """Four 768x768 (Q, K, V, O), one 3072x768 and one 768x3072 for each layer, fp32."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    return [torch.randn(shape) * 0.02 for _ in range(layers) for shape in shapes]


def alternating(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, the calls taking turns, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that is allocated at a time during `call` beyond what was before it, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def median(times: list[float]) -> float:
    return statistics.median(times)


def spread(times: list[float]) -> str:
    low, _, high = statistics.quantiles(times, n=4)
    return f"{low:.1f} - {high:.1f}"


def commit() -> str:
    """The checkout's; what the variable COMMIT says where the tree came without its history; else nothing."""
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return os.environ.get("COMMIT", "")
    return asked.stdout.strip() or os.environ.get("COMMIT", "")


def save(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """The result with what it ran on, as JSON."""
    machine = {
        "benchmark": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "working_dtype": str(working_dtype(torch.zeros(1), "auto")),
        "commit": commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine, **result}, indent=1) + "\n")
    print(f"written to {path}")
