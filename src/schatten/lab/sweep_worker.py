"""The workers of a sweep: one takes trial after trial until the study is finished; a pool of them outlives any that dies."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schatten.lab import sweep_space
from schatten.lab.sweep import Objective, Report, Sweep
from schatten.lab.sweep_study import ERROR, RELEASED, SLOT, Study
from schatten.lab.tuning import Params, Span

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

Say = Callable[[str], None]

# Seconds between looks at a study whose last trials others are running.
POLL = 0.5

# Seconds that workers have to give their trials back after Ctrl-C.
STOPPING = 10

# Beats within `grace`: a few may be late or lost.
BEATS = 5

# Successive halving: the best third goes on from each rung to the next, at three times as many steps.
REDUCTION = 3
RUNGS = 2


class Lost(Exception):
    """The trial is no longer this worker's: another took it for dead, or the command that started the worker is gone."""


class Unfinished(Exception):
    """The workers have ended, the study has not."""


class Broken(Exception):
    """A point at which the objective raises; the message says which and what."""


@dataclass
class Lease:
    """Beats for a running trial from a thread of its own; `lost` once the trial, or the process `parent`, is gone."""

    study: Study
    id: int
    parent: int | None = None
    lost: bool = False
    _end: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def held(self) -> "Iterator[Lease]":
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(self.study.grace / BEATS) and not self.lost:
            count += 1
            # A database that is away for a moment costs a beat, not the trial.
            with contextlib.suppress(Exception):
                self.lost = not self.study.beat(self.id, count) or orphaned(self.parent)
        self.study.storage.remove_session()


def work(
    study: Study,
    sweep: Sweep,
    objective: Callable[[Params, Report], float],
    *,
    worker: str | None = None,
    parent: int | None = None,
    say: Say = print,
) -> None:
    """Take trials of `study` until all are settled, also those that a dead worker leaves behind.

    `parent` is the process that started this one; without it the worker gives its trial back and returns.
    """
    name, grid = worker or new_name(), points(sweep)
    while not orphaned(parent):
        study.fill(grid, at_once=study.reap() > 0)
        claimed = study.claim(name)
        if claimed is not None:
            say(_run(study, sweep, objective, *claimed, parent))
        elif study.finished():
            return
        else:
            time.sleep(POLL)


def points(sweep: Sweep) -> list[Params]:
    """The params of each slot of a grid, none for samplers that draw them."""
    return sweep_space.grid(sweep.space, sweep.seed) if sweep.sampler == "grid" else []


def _run(
    study: Study,
    sweep: Sweep,
    objective: Callable[[Params, Report], float],
    id: int,
    frozen: "FrozenTrial",
    parent: int | None,
) -> str:
    """Run a claimed trial to its end; the line that says what came of it."""
    import optuna

    slot, started = frozen.user_attrs[SLOT], time.perf_counter()
    with Lease(study, id, parent).held() as lease:
        # A view of its own for each trial: one keeps the trials it has seen, and knows those alone that it has seen.
        view = optuna.load_study(
            study_name=study.name, storage=study.storage, sampler=_sampler(sweep, slot), pruner=_pruner(sweep)
        )
        view.get_trials(deepcopy=False)
        trial = optuna.Trial(view, id)
        evaluations: list[float] = []
        params: Params = {}

        def report(step: int, loss: float) -> None:
            if lease.lost:
                raise Lost
            evaluations.append(loss)
            trial.report(loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            params = _suggested(trial, sweep)
            state, loss = "COMPLETE", _measured(objective, params, report)
        except optuna.TrialPruned:
            state, loss = "PRUNED", evaluations[-1]
        except (Lost, optuna.exceptions.UpdateFinishedTrialError):
            study.fail(id, RELEASED)
            return f"trial {slot}: given back, this worker was taken for dead or its command has ended"
        except KeyboardInterrupt:
            study.fail(id, RELEASED)
            raise
        except Broken as error:
            study.fail(id, f"{ERROR}{error}")
            return f"trial {slot}: failed: {error}"
        settled = study.finish(id, state, loss)
    found = f"{'pruned at ' if state == 'PRUNED' else ''}loss {loss:.5g}" if settled else "taken by another worker"
    return f"trial {slot}: {_shown(params)}: {found} ({time.perf_counter() - started:.1f} s)"


def _measured(objective: Callable[[Params, Report], float], params: Params, report: Report) -> float:
    """The objective's value; an exception of its own, not of the study, as Broken."""
    from optuna.exceptions import OptunaError

    try:
        return objective(params, report)
    except (Lost, OptunaError):
        raise
    except Exception as error:  # of this point, whatever it is: others go on, and the report names it
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        raise Broken(f"{_shown(params)}: {type(error).__name__} at {place}: {error}") from error


def _suggested(trial: "Trial", sweep: Sweep) -> Params:
    return {
        name: trial.suggest_float(name, entry.low, entry.high, log=entry.log)
        if isinstance(entry, Span)
        else trial.suggest_categorical(name, entry)
        for name, entry in sweep.space.items()
    }


def _sampler(sweep: Sweep, slot: int) -> "BaseSampler":
    """Seeded by study and slot: workers with equal seeds would draw equal points, and a trial tried again draws its own."""
    import optuna

    seed = int(np.random.SeedSequence((sweep.seed, slot)).generate_state(1)[0])
    if sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    # A grid's points lie in the database; its sampler is not asked.
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> "BasePruner":
    import optuna

    if sweep.pruner == "none":
        return optuna.pruners.NopPruner()
    # One step more than an even division, or the last evaluation were a rung and would prune what is complete.
    first = sweep.steps // REDUCTION**RUNGS + 1
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)


def _shown(params: Params) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in params.items())


def orphaned(parent: int | None) -> bool:
    return parent is not None and os.getppid() != parent


def new_name() -> str:
    """A worker's name, unlike any other's on any machine."""
    return f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"


# -- several on this machine -------------------------------------------------------------------------------------------


def pool(study: Study, sweep: Sweep, jobs: int, say: Say) -> None:
    """`jobs` worker processes until the study is finished; one that dies while it gets anywhere is replaced.

    Raises Unfinished when all have ended and trials are left.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[int, Any]] = {}

    def start(index: int) -> None:
        name = new_name()
        arguments = (study.url, study.name, study.grace, sweep, name, index, os.getpid())
        process = context.Process(target=_process, args=arguments, daemon=True)
        process.start()
        running[name] = (index, process)

    for index in range(jobs):
        start(index)
    try:
        while running:
            connection.wait([process.sentinel for _, process in running.values()])
            for name, (index, process) in [pair for pair in running.items() if not pair[1][1].is_alive()]:
                del running[name]
                if process.exitcode == 0:
                    continue
                left = study.bury(name)
                study.fill(points(sweep), at_once=left > 0)
                again = ", its trial is tried again" if left else ""
                say(f"a worker (process {process.pid}) ended with exit code {process.exitcode}{again}")
                # One that died before its first trial would die again.
                if (left or _has_finished(study, name)) and not study.finished():
                    start(index)
    except KeyboardInterrupt:
        for name, (_, process) in running.items():
            process.join(timeout=STOPPING)
            # Ctrl-C can strike where Python swallows it.
            process.kill()
            process.join()
            study.bury(name, RELEASED)
        raise
    if not study.finished():
        raise Unfinished("all its workers have ended")


def _has_finished(study: Study, worker: str) -> bool:
    return any(trial.user_attrs.get("worker") == worker for trial in study.results())


def _process(url: str, name: str, grace: float, sweep: Sweep, worker: str, index: int, parent: int) -> None:
    """A worker process, on the accelerator of its index where there are several."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(index % torch.accelerator.device_count())
    # Ctrl-C reaches all processes of a terminal; the command itself says what follows.
    with contextlib.suppress(KeyboardInterrupt):
        work(Study(url, name, grace=grace), sweep, Objective.load(sweep), worker=worker, parent=parent, say=_print)


def _print(line: str) -> None:
    print(line, flush=True)
