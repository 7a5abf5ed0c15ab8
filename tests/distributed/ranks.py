"""Ranks: a function on several gloo processes of this machine, which meet in a file, so that no port can be taken.

They are forked from one process that has imported torch, which takes seconds and is done once for a whole test run; a rank
then starts in milliseconds.
"""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from datetime import timedelta
from functools import wraps
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

# How long a rank waits for another in a collective.
PATIENCE = timedelta(seconds=20)


def run(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    dies: Collection[int] = (),
    patience: timedelta = PATIENCE,
    timeout: float = 150.0,
    grace: float = 5.0,
) -> list[Any]:
    """What `function(rank, size, *args)` returns on each of `size` ranks of a new process group: tensors and plain values.

    `function` is one of a module's, as it is sent by its name. Ranks in `dies` may end in any way, and give None. Raises
    AssertionError with what the ranks have printed if another fails, and the rest do not end within `grace` seconds, or if
    they take longer than `timeout` seconds. Warnings are errors.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(function, rank, size, folder, patience, args), daemon=True)
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            failed = _waited(processes, set(range(size)) - set(dies), time.monotonic() + timeout, grace)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failed:
            codes = [processes[rank].exitcode for rank in failed]
            text = f"Ranks {failed} of {function.__qualname__} failed, with exit codes {codes}.\n"
            raise AssertionError(text + _printed(folder, size))
        return [None if rank in dies else torch.load(folder / f"{rank}.pt") for rank in range(size)]


def remembered(call: Callable[..., T]) -> Callable[..., T]:
    """As functools.cache, which forgets failures: ranks that have failed are not started again for each test."""
    outcomes: dict[tuple[Any, ...], tuple[T | None, AssertionError | None]] = {}

    @wraps(call)
    def again(*args: Any) -> T:
        if args not in outcomes:
            try:
                outcomes[args] = call(*args), None
            except AssertionError as error:
                outcomes[args] = None, error
        found, failure = outcomes[args]
        if failure is not None:
            raise failure
        return cast(T, found)

    return again


def _waited(processes: list[BaseProcess], needed: set[int], deadline: float, grace: float) -> list[int]:
    """Wait until these have ended, or one has failed and the others had time to; the ranks that have not ended well."""
    while running := [processes[rank] for rank in needed if processes[rank].exitcode is None]:
        if any(processes[rank].exitcode not in (None, 0) for rank in needed):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            break
        wait([p.sentinel for p in running], timeout=0.2)
    return [rank for rank in sorted(needed) if processes[rank].exitcode != 0]


def _printed(folder: Path, size: int) -> str:
    logs = [folder / f"{rank}.log" for rank in range(size)]
    return "\n".join(f"-- rank {rank} --\n{log.read_text()[-6000:]}" for rank, log in enumerate(logs) if log.exists())


def _rank(function: Callable[..., Any], rank: int, size: int, folder: Path, patience: timedelta, args: tuple[Any, ...]) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    # A crash in compiled code leaves no traceback otherwise.
    faulthandler.enable()
    warnings.simplefilter("error")
    # Ranks share the cores: with a thread for each core they are slower. Of the environment torch has read this long ago.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    torch.save(function(rank, size, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()
