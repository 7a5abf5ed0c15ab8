"""Timing and memory of steps, and the rates of a device, measured where the table is.

On a GPU a time is that between two CUDA events around a batch of steps, and a reading of the host's clock goes with it; on
a CPU it is the wall clock's.
"""

import math
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import torch

from schatten.solvers.core import working_dtype

Step = Callable[[], object]

# A batch of steps lasts so long at least: events are good to a microsecond, a clock that changes pace is not.
BATCH_SECONDS = 0.03
MOST_STEPS = 64

QUERIED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


class Timed(NamedTuple):
    """Milliseconds of one step: between events (wall clock on a CPU), by the wall clock with the wait for the device, and
    until the host was through with a step of an idle device. A host that issues more launches than the driver queues (about
    a thousand) waits for the device in between, so the last is no more than an upper bound for such steps.
    """

    milliseconds: float
    wall: float
    host: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Step, steps: int, device: torch.device) -> Timed:
    """A batch of `steps` steps after the device has come to rest."""
    synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    start = time.perf_counter()
    if events:
        events[0].record()
    step()
    host = time.perf_counter() - start
    for _ in range(steps - 1):
        step()
    if events:
        events[1].record()
    synchronize(device)
    wall = 1e3 * (time.perf_counter() - start) / steps
    return Timed(events[0].elapsed_time(events[1]) / steps if events else wall, wall, 1e3 * host)


def batch_of(seconds: float) -> int:
    """How many steps of `seconds` each are timed together."""
    return min(MOST_STEPS, max(1, math.ceil(BATCH_SECONDS / max(seconds, 1e-9))))


def extra_bytes(step: Step, device: torch.device) -> int:
    """The most that is allocated at a time during a step beyond what was before it."""
    if device.type != "cuda":
        return common.peak_bytes(step)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, quick: bool) -> dict[str, Any]:
    """The rate of products of random square matrices in the solvers' precision, the best of some sizes, and that of a copy
    on the device, read and written bytes counted.
    """
    cuda = device.type == "cuda"
    sides = (256, 512) if not cuda else (2048,) if quick else (4096, 8192, 16384)
    dtype = working_dtype(torch.zeros(1, device=device), "auto")
    products = []
    for side in sides:
        A, B = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        products.append(
            {"side": side, "teraflops": 2e-12 * side**3 / _seconds(partial(torch.mm, A, B, out=torch.empty_like(A)), device)}
        )
    source = torch.randn((1 << 30) // 4 if cuda else 1 << 22, device=device)
    copied = torch.empty_like(source)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "products": products,
        "peak_teraflops": max(p["teraflops"] for p in products),
        "copy_gigabytes_per_second": 2e-9 * source.nbytes / _seconds(partial(copied.copy_, source), device),
    }


def _seconds(call: Step, device: torch.device, rounds: int = 7) -> float:
    for _ in range(2):
        call()
    steps = batch_of(1e-3 * timed(call, 1, device).wall)
    return 1e-3 * common.median([timed(call, steps, device).milliseconds for _ in range(rounds)])


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi reads of the GPU's clocks, power and temperature, with units; None where it does not answer."""
    if device.type != "cuda":
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    # A machine of one GPU may know it by another name.
    for which in ([f"--id=GPU-{uuid.removeprefix('GPU-')}"], []):
        command = ["nvidia-smi", *which, f"--query-gpu={QUERIED}", "--format=csv,noheader"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            continue
        lines = asked.stdout.strip().splitlines()
        if len(lines) == 1:
            return dict(zip(QUERIED.split(","), (value.strip() for value in lines[0].split(",")), strict=True))
    return None
