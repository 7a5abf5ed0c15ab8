"""Contenders taking turns on one copy of a model's parameters, and what each turn found."""

import gc
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gpu_parts.contenders import WARM_UP, Built, Contender
from gpu_parts.models import SPARE_BYTES, Model, Parameters
from gpu_parts.timing import Timed, batch_of, extra_bytes, timed

# Seconds that the rounds of a model may take before there are fewer of them, and how many there are at least.
SECONDS = 30.0
FEWEST = 4

# A step that takes longer needs no third one to warm up.
LONG_SECONDS = 0.3

STOPPED = "KeyboardInterrupt: stopped before its turn"


@dataclass
class Record:
    """What is known of one contender."""

    times: list[Timed] = field(default_factory=list)
    steps: int | None = None
    extra_bytes: int | None = None
    max_batch_bytes: int | None = None
    error: str | None = None


def fits(model: Model, contenders: Sequence[Contender], device: torch.device) -> bool:
    """Whether the states of all contenders fit into what is left beside weights and gradients."""
    if device.type != "cuda":
        return True
    states = sum(model.entries * (2 * model.dtype.itemsize if c.task == "adamw" else 4) for c in contenders)
    free, _ = torch.cuda.mem_get_info(device)
    return states + SPARE_BYTES < free


def order(contenders: Sequence[Contender], together: bool) -> list[tuple[list[Contender], int]]:
    """Who takes turns with whom, and in how many parts the rounds of these are.

    Where states do not fit beside each other, everyone is alone, and the second part in reverse order sees a drift. Peers come
    last, when all else has been measured once: some compile for a minute, and keep memory.
    """
    own, peers = ([c for c in contenders if c.peer == peer] for peer in (False, True))
    if not together:
        return [([c], 2) for c in (*own, *reversed(own))] + [([c], 1) for c in peers]
    return [(own, 2), (own + peers, 2)] if peers else [(own, 1)]


def measured(
    contenders: Sequence[Contender], parameters: Parameters, rounds: int, device: torch.device, together: bool
) -> tuple[dict[str, Record], bool]:
    """Each contender's record, and whether an interrupt ended the turns. One that raises is left out from then on, and its
    record says what it raised.
    """
    records = {c.name: Record() for c in contenders}
    turns = order(contenders, together)
    stopped = False
    for turn, parts in turns:
        try:
            least, most = math.ceil(FEWEST / parts), math.ceil(rounds / parts)
            _turn(turn, records, parameters, (least, most), SECONDS / len(turns), device)
        except KeyboardInterrupt:
            stopped = True
            break
        free(device)
    for record in records.values():
        if not record.times and record.error is None:
            record.error = STOPPED
    return records, stopped


def _turn(
    turn: Sequence[Contender],
    records: dict[str, Record],
    parameters: Parameters,
    rounds: tuple[int, int],
    allowed: float,
    device: torch.device,
) -> None:
    """Rounds of these contenders, one after the other in each: between so many, as `allowed` seconds hold."""
    ready: dict[str, tuple[Built, int]] = {}
    needed = 0.0
    for contender in turn:
        record = records[contender.name]
        if record.error is not None:
            continue
        try:
            built, steps, seconds = _ready(contender, record, parameters, device)
        except Exception as error:
            _failed(contender, record, error, device)
            continue
        ready[contender.name] = built, steps
        needed += steps * seconds
    least, most = rounds
    for _ in range(min(most, max(least, int(allowed / max(needed, 1e-9))))):
        for contender in turn:
            if contender.name not in ready:
                continue
            built, steps = ready[contender.name]
            try:
                records[contender.name].times.append(timed(built.step, steps, device))
            except Exception as error:
                _failed(contender, records[contender.name], error, device)
                del ready[contender.name], built


def _ready(contender: Contender, record: Record, parameters: Parameters, device: torch.device) -> tuple[Built, int, float]:
    """Built, warmed up and measured for memory: (built, steps of a batch, seconds of a step)."""
    print(f"  {contender.name} ...", end="", flush=True)
    built = contender.build(parameters)
    seconds = 0.0
    for number in range(WARM_UP):
        seconds = 1e-3 * timed(built.step, 1, device).wall
        if number > 0 and seconds > LONG_SECONDS:
            break
    if record.steps is None:
        record.max_batch_bytes = built.max_batch_bytes
        record.extra_bytes = extra_bytes(built.step, device) if built.captured_bytes is None else built.captured_bytes
        record.steps = batch_of(seconds)
    print(f" {1e3 * seconds:.2f} ms", flush=True)
    return built, record.steps, seconds


def _failed(contender: Contender, record: Record, error: Exception, device: torch.device) -> None:
    record.error = first_line(error)
    print(f"  {contender.name} failed: {record.error}", flush=True)
    if not contender.peer:
        traceback.print_exception(error, file=sys.stderr)
    # Frames of the traceback hold its state.
    error.__traceback__ = None
    free(device)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def free(device: torch.device) -> None:
    """Give back to the device what nobody holds any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
