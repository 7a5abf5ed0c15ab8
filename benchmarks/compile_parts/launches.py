"""Launches of the library's own kernels under a driver that stands for a GPU: every launch compiles and none runs."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

# The interpreter is chosen when kernels are defined.
os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import schatten.kernels.triton  # noqa: F401  (defines them)
from schatten.kernels import choice
from schatten.kernels.triton import tuning

# Multiprocessors of an A100, H100 and B200.
PROCESSORS = {80: 108, 90: 132, 100: 148}

# A variety is needed if the first candidate is taken, or if all are tried, or if another turns out the fastest.
FIRST, SEARCHED, CHOSEN = range(3)


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
