"""Which of a handful of tile sizes a kernel runs with: each is timed once on a kind of device, and the times stay on disk.

One small JSON file for each (device, Triton version, kernel, key) in `$SCHATTEN_CACHE`, else `$XDG_CACHE_HOME/schatten`, else
`~/.cache/schatten`. A file is replaced as a whole and holds one search, so that processes that write at the same time lose
nothing of each other's. A file that cannot be read, or is not what was asked for, is as good as none; a folder that cannot
be written to leaves the choice in memory.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import distributed
from triton.runtime.errors import OutOfResources, PTXASError

from schatten.kernels.choice import interpreted

# Timed launches of each candidate, after one that compiles; the fastest counts, as everything else only adds to it.
RUNS = 5

# Clock cycles, about a millisecond, for which the device waits while the timed launches are queued: a short kernel would
# otherwise be timed with the gaps that Python leaves between launches.
QUEUEING = 2_000_000

Candidate = TypeVar("Candidate", bound=tuple[int, ...])

_chosen: dict[tuple[str, tuple[Any, ...], torch.device], Any] = {}


def choose(
    kernel: str,
    key: tuple[Any, ...],
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], None],
    device: torch.device,
) -> Candidate:
    """The fastest of `candidates` (tuples of integers, the one to take unseen first) for `kernel` at `key` on `device`.

    `key` holds what the choice depends on, as numbers, strings and dtypes: a kernel and a key always come with the same
    candidates. `run` launches one of them, RUNS + 1 times if it comes to a search, and waits for nothing: what it writes must
    be overwritten, or lie in memory of its own. A candidate that needs more shared memory, threads or registers than there
    are is passed over; if all do, the first one's error is raised, and any other error as it comes.

    The first candidate is taken, and nothing timed or read, where there is no choice: off a GPU, in Triton's interpreter, and
    for a single candidate. So it is where the bits of a result must not depend on a stopwatch, as another tile may sum in
    another order: with `torch.use_deterministic_algorithms`, and in every process of a `torch.distributed` world of two or
    more. There replicas apply an update each for themselves, and would drift apart if they chose differently. A file they
    share does not rule that out: they may lie on different machines, or look for it before and after it is written.

    While a CUDA graph is captured nothing can be timed: what is known is taken, else the first candidate for this time.
    """
    first = candidates[0]
    if len(candidates) == 1 or device.type != "cuda" or _agreed():
        return first
    place = (kernel, key, device)
    found = _chosen.get(place)
    if found is not None and found in candidates:
        return found
    if interpreted():
        return first
    record = _record(kernel, key, candidates, device)
    file = _file(record)
    times = _read(file, record)
    if times is None:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return first
        times = _search(candidates, run, device)
        _write(file, {**record, "milliseconds": times})
    _chosen[place] = fastest = min(zip(candidates, times, strict=True), key=_time)[0]
    return fastest


def _time(pair: tuple[Any, float | None]) -> float:
    return math.inf if pair[1] is None else pair[1]


def milliseconds(launch: Callable[[], None], device: torch.device) -> float:
    """The shortest of RUNS launches on the current stream of `device`, after one that compiles."""
    with torch.cuda.device(device):
        launch()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
        torch.cuda._sleep(QUEUEING)
        marks[0].record()
        for mark in marks[1:]:
            launch()
            mark.record()
        marks[-1].synchronize()
    return min(start.elapsed_time(end) for start, end in itertools.pairwise(marks))


def _agreed() -> bool:
    """Whether every process must take the same candidate without asking the others."""
    if torch.are_deterministic_algorithms_enabled():
        return True
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _search(candidates: Sequence[Candidate], run: Callable[[Candidate], None], device: torch.device) -> list[float | None]:
    """Milliseconds of each candidate, None for those the device has not the resources for; at least one number."""
    times: list[float | None] = []
    refused: list[Exception] = []
    for candidate in candidates:
        try:
            times.append(milliseconds(lambda chosen=candidate: run(chosen), device))
        except (OutOfResources, PTXASError) as error:
            times.append(None)
            refused.append(error)
    if len(refused) == len(candidates):
        raise refused[0]
    return times


def _record(kernel: str, key: tuple[Any, ...], candidates: Sequence[Candidate], device: torch.device) -> dict[str, Any]:
    """What a file says of its search besides the times; `key` as text, because a dtype has no other form in JSON."""
    return {
        "device": torch.cuda.get_device_name(device),
        "triton": triton.__version__,
        "kernel": kernel,
        "key": repr(key),
        "candidates": [list(candidate) for candidate in candidates],
    }


def _folder() -> Path | None:
    own, shared = os.environ.get("SCHATTEN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own) / "tuning"
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "schatten" / "tuning"
    except RuntimeError:
        # A user without a home, as in some containers.
        return None


def _file(record: Mapping[str, Any]) -> Path | None:
    folder = _folder()
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return None if folder is None else folder / f"{record['kernel']}-{digest[:20]}.json"


def _read(file: Path | None, record: Mapping[str, Any]) -> list[float | None] | None:
    """The times in `file` if it holds the search of `record`, one for each candidate."""
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in record.items()):
        return None
    times = found.get("milliseconds")
    if not isinstance(times, list) or len(times) != len(record["candidates"]):
        return None
    known = [t for t in times if t is not None]
    return times if known and all(isinstance(t, float) and math.isfinite(t) for t in known) else None


def _write(file: Path | None, record: Mapping[str, Any]) -> None:
    """Replace `file` as a whole, so that a reader finds the old one or the new; nothing where it cannot be written."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, suffix=".part", delete=False) as part:
            written = Path(part.name)
            try:
                json.dump(record, part, indent=1)
                part.close()
                written.replace(file)
            except OSError:
                written.unlink()
                raise
