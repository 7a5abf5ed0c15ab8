"""Measuring a machine: the rates of a rank in the units of the cost model, while all other ranks do the same."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from schatten.optimizer import SpectralOptimizer
from schatten.placements.cost import work
from schatten.placements.machine import Machine
from schatten.rule import Rule
from schatten.solvers.core import working_dtype

# Sides of the matrices that are multiplied and factorised, entries of what is read and written, bytes for each rank, and
# parameters of a step.
SIDE, FACTORISED, ENTRIES, BYTES, PARAMETERS = 512, 128, 1 << 22, 1 << 22, 32


def measured(
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Machine:
    """This machine, by medians of `repeats` runs of each kind of work, taken at once by all ranks of `group`.

    A collective: all ranks call it together and get the same numbers, means over ranks. Without a process group there is
    nobody to send to, and collectives take no time. Ranks that share cores or a network share its rates, with other programs
    too: `clock=time.process_time` counts on a CPU what this process does alone, and no waiting.

    Example:
        >>> from schatten.lab.measure import measured
        >>> measured(repeats=1).flops > 0
        True
    """
    device = torch.device(device)
    ranks = dist.get_world_size(group) if dist.is_initialized() else 1

    def seconds(call: Callable[[], object], calls: int = 1) -> float:
        times = []
        for repeat in range(repeats + 1):
            _together(group, ranks, device)
            start = clock()
            for _ in range(calls):
                call()
            _wait(device)
            if repeat > 0:
                times.append((clock() - start) / calls)
        return statistics.median(times)

    X = torch.randn(4, SIDE, SIDE, device=device).to(working_dtype(torch.empty(0, device=device), "auto"))
    product = torch.empty_like(X)
    F = torch.randn(4, FACTORISED, FACTORISED, device=device)
    a, b = torch.randn(2, ENTRIES, device=device)
    # What a kernel takes whatever its size, Python included: a direction too small for anything else to count.
    muon, small = Rule(), torch.randn(1, 8, 8, device=device)
    kernels = len(work(muon, 8, 8).direction)
    # And what a parameter takes, which counts as a piece: a step of matrices without size.
    tiny = [torch.nn.Parameter(torch.ones(4, 4, device=device)) for _ in range(PARAMETERS)]
    for p in tiny:
        p.grad = torch.ones_like(p)
    rates = [
        2 * 4 * SIDE**3 / seconds(partial(torch.bmm, X, X, out=product)),
        # Into fresh memory, as most work of a step: on a CPU its pages cost more than the arithmetic.
        3 * a.nbytes / seconds(partial(torch.lerp, a, b, 0.5)),
        4 * (8 / 3) * FACTORISED**3 / seconds(partial(torch.linalg.qr, F)),
        seconds(partial(muon.direction, small, {}, {}), calls=20) / kernels,
        seconds(SpectralOptimizer(tiny, muon, momentum=0.9).step) / PARAMETERS,
    ]
    latency, bandwidth = 0.0, 1.0
    if ranks > 1:
        empty, full = (seconds(_exchange(n, ranks, group, device)) for n in (1, BYTES // 4))
        latency, bandwidth = empty, (ranks - 1) * BYTES / max(full - empty, full / 2)
    found = torch.tensor([*rates, latency, bandwidth], dtype=torch.float64)
    if ranks > 1:
        total = found.to(device)
        dist.all_reduce(total, group=group)
        found = (total / ranks).cpu()
    flops, memory, factorisation, launch, host, latency, bandwidth = found.tolist()
    return Machine(flops, bandwidth, latency, memory, factorisation, launch, host)


def _exchange(entries: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device) -> Callable[[], object]:
    sent = torch.zeros(entries * ranks, device=device)
    return partial(dist.all_to_all_single, torch.empty_like(sent), sent, group=group)


def _together(group: dist.ProcessGroup | None, ranks: int, device: torch.device) -> None:
    _wait(device)
    if ranks > 1:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _wait(device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
