"""Runs that save by torch.distributed.checkpoint, load elsewhere and go on, as `tests/distributed/ranks.py` runs them.

Of two kinds: the parity model in its own training, and `checkpoint_parts.Parts`.
"""

import os
import signal
import threading
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

import schatten
from tests.distributed import parity_runs
from tests.distributed.checkpoint_parts import Run, Values, stepped, weights
from tests.distributed.parity_model import GPT, RULES, loss
from tests.integrations.dcp_runs import load, save

# Steps before the checkpoint, and all steps.
SAVED, END = 2, 4

# -- the parity model ----------------------------------------------------------------------------------------------------

WRAPS = {"one process": parity_runs.one, "DDP": parity_runs.ddp, "FSDP2": parity_runs.fsdp}


class Training(NamedTuple):
    model: nn.Module
    opt: schatten.SpectralOptimizer
    part: int
    parts: int

    def train(self, steps: Iterable[int]) -> "Training":
        for step in steps:
            loss(self.model, step, self.part, self.parts).backward()
            self.opt.step()
            self.opt.zero_grad()
        return self


def training(placement: str, rank: int, size: int) -> Training:
    model, part, parts = WRAPS[placement](GPT(), rank, size)
    solver = schatten.solvers.polynomial(dtype="float32")
    return Training(model, schatten.Muon(model, lr=3e-3, weight_decay=0.1, rules=RULES, solver=solver), part, parts)


def loaded(placement: str, folder: Path, rank: int, size: int) -> Training:
    found = training(placement, rank, size)
    load(found.model, found.opt, folder)
    return found


def trained(rank: int, size: int, folder: Path) -> list[Values]:
    """Train and save under FSDP2; weights after more steps, and after the same from the checkpoint."""
    own = training("FSDP2", rank, size).train(range(SAVED))
    save(own.model, own.opt, folder)
    ends = [own.train(range(SAVED, END)), loaded("FSDP2", folder, rank, size).train(range(SAVED, END))]
    return [weights(end.model) for end in ends]


def elsewhere(rank: int, size: int, folder: Path, placements: list[str], before: Path | None, leg: int) -> dict[str, Values]:
    """Go on from `trained` in other placements, and two steps on the way through several numbers of ranks, from `before`."""
    found = {p: weights(loaded(p, folder, rank, size).train(range(SAVED, END)).model) for p in placements}
    own = training("FSDP2", rank, size) if before is None else loaded("FSDP2", before, rank, size)
    own.train(range(2 * leg, 2 * leg + 2))
    save(own.model, own.opt, folder / f"leg {leg}")
    return {**found, "leg": weights(own.model)}


def undivided(rank: int, size: int, steps: int) -> Values:
    return weights(training("one process", rank, size).train(range(steps)).model)


# -- parts -----------------------------------------------------------------------------------------------------------------


def saves(rank: int, size: int, folder: Path, runs: list[Run]) -> list[dict[str, Values]]:
    """Of each run what was saved, where it went on to, and where it got from the checkpoint."""
    found = []
    for i, run in enumerate(runs):
        own = stepped(run, size).step(range(SAVED))
        save(own.model, own.opt, folder / str(i))
        saved = own.values()
        twin = stepped(run, size)
        load(twin.model, twin.opt, folder / str(i))
        ends = [it.step(range(SAVED, END)).values() for it in (own, twin)]
        found.append({"saved": saved, "uninterrupted": ends[0], "resumed": ends[1]})
    return found


def loads(rank: int, size: int, folder: Path, cases: list[tuple[int, Run]]) -> list[dict[str, Values]]:
    """Of each checkpoint, as the given run loads it, what was loaded and where that went on to."""
    found = []
    for i, run in cases:
        own = stepped(run, size)
        load(own.model, own.opt, folder / str(i))
        found.append({"loaded": own.values(), "continued": own.step(range(SAVED, END)).values()})
    return found


# -- saves in the background and broken off -------------------------------------------------------------------------------


def in_the_background(rank: int, size: int, folder: Path) -> dict[str, Values]:
    """Train on while a checkpoint waits to be written."""
    # A group of its own: the one of the training serves one collective at a time.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=20))
    run = Run("FSDP2", "NorMuon")
    own = stepped(run, size).step(range(SAVED))
    saved, now, write = own.values(), threading.Event(), FileSystemWriter.write_data

    def later(writer: FileSystemWriter, plan: Any, planner: Any) -> Any:
        assert now.wait(timeout=20)
        return write(writer, plan, planner)

    of_model, of_opt = get_state_dict(own.model, own.opt)
    with mock.patch.object(FileSystemWriter, "write_data", later):
        both = {"model": of_model, "optimizer": of_opt}
        future: Any = dcp.async_save(both, checkpoint_id=folder, process_group=group)
        own.step(range(SAVED, END))
        now.set()
        future.result()
    twin = stepped(run, size)
    load(twin.model, twin.opt, folder)
    return {"saved": saved, "loaded": twin.values()}


class Dying(DefaultSavePlanner):
    """Kills its process when it is asked for the third thing to write."""

    asked = 0

    def resolve_data(self, write_item: Any) -> Any:
        self.asked += 1
        if self.asked == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().resolve_data(write_item)


def broken_off(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The second rank dies while it writes the second checkpoint: what the first hears, and what the checkpoint had held."""
    own = stepped(Run("FSDP2", "NorMuon"), size).step(range(SAVED))
    save(own.model, own.opt, folder / "step-000002")
    own.step(range(SAVED, END))
    of_model, of_opt = get_state_dict(own.model, own.opt)
    ended = own.values()
    try:
        planner = Dying() if rank == 1 else None
        dcp.save({"model": of_model, "optimizer": of_opt}, checkpoint_id=folder / "step-000004", planner=planner)
        heard = "nothing"
    except Exception as error:
        heard = type(error).__name__
    return {"heard": heard, "ended": ended}


def after_the_break(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint, go on, and save where the save was broken off."""
    newest = max(folder.glob("step-*/.metadata")).parent
    own = stepped(Run("FSDP2", "NorMuon"), size)
    load(own.model, own.opt, newest)
    own.step(range(SAVED, END))
    save(own.model, own.opt, folder / "step-000004")
    return {"newest": newest.name, "ended": own.values(), "next": max(folder.glob("step-*/.metadata")).parent.name}
