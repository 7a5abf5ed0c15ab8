"""A study in a database: N trials, each run once, by whichever worker of whichever machine takes it first.

Each of the slots 0 .. N-1 of a study is one Optuna trial, waiting at first. All that workers agree on is four facts:

- a transition of a trial's state (waiting -> running -> complete, pruned or failed) is one transaction, so one worker wins it;
- a running trial shows a beat that changes; whoever sees it unchanged for `grace` seconds of its own clock fails the trial;
- a slot without a live trial is put up again (`fill`), with the params of the trial that died, at most ATTEMPTS times;
- of several live trials of one slot, which two workers filling at once can leave, only that of the lowest number runs.

The last three need no order among workers: any of them may do any of it at any time, or die between two of them. Optuna's
own heartbeat and GridSampler do not give as much: on SQLite two workers can both win a waiting trial (its row locks are not
there), a trial whose worker dies before the first heartbeat stays running for ever, and grids repeat points.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schatten.lab.errors import InputError
from schatten.lab.tuning import Params

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

# A trial that has taken so many workers with it is given up: it would take the next one.
ATTEMPTS = 3

# Seconds a worker waits for the database's lock, and for a study that another machine is just creating.
PATIENCE = 60
CREATION = 5

# Attributes of a trial: its slot, who runs it, the lease, and why it failed where its worker did not die.
SLOT, WORKER, BEAT, WHY = "slot", "worker", "beat", "why"
DUPLICATE, RELEASED, ERROR = "duplicate", "released", "error: "


@dataclass(frozen=True)
class Slot:
    """One of the N trials: the Optuna trials that have tried it, by number."""

    number: int
    trials: "tuple[FrozenTrial, ...]"

    @property
    def live(self) -> "FrozenTrial | None":
        """The trial that counts: finished, running or waiting, the lowest number of them."""
        return next((t for t in self.trials if t.state.name != "FAIL"), None)

    @property
    def result(self) -> "FrozenTrial | None":
        """The trial that settled it: complete, pruned, or failed by an error of its own or for the last time."""
        if wrong := [t for t in self.trials if t.state.name == "FAIL" and t.user_attrs.get(WHY, "").startswith(ERROR)]:
            return wrong[0]
        if self.live is not None:
            return self.live if self.live.state.name in ("COMPLETE", "PRUNED") else None
        return next(iter(self.deaths[ATTEMPTS - 1 :]), None)

    @property
    def deaths(self) -> "list[FrozenTrial]":
        """The trials whose worker died."""
        return [t for t in self.trials if t.state.name == "FAIL" and WHY not in t.user_attrs]


class Study:
    """The study `name` of the database `url`, as `create` has left it there."""

    def __init__(self, url: str, name: str, *, grace: float) -> None:
        self.url, self.name, self.grace = url, name, grace
        self.storage = connect(url)
        self._id = self.storage.get_study_id_from_name(name)
        self._beats: dict[int, tuple[Any, float]] = {}
        self._lacking: set[int] = set()

    @property
    def count(self) -> int:
        """N."""
        return int(self.storage.get_study_user_attrs(self._id)["trials"])

    @property
    def settings(self) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(self._id)["sweep"]

    def slots(self) -> list[Slot]:
        """All of them, also those that no trial has tried."""
        trials: dict[int, list[FrozenTrial]] = defaultdict(list)
        for trial in self.storage.get_all_trials(self._id, deepcopy=False):
            trials[trial.user_attrs.get(SLOT, -1)].append(trial)
        return [Slot(k, tuple(sorted(trials[k], key=lambda t: t.number))) for k in range(self.count)]

    def results(self) -> "list[FrozenTrial]":
        """The settled trials by slot."""
        return [slot.result for slot in self.slots() if slot.result is not None]

    def finished(self) -> bool:
        return all(slot.result is not None for slot in self.slots())

    def fill(self, points: Sequence[Params], *, at_once: bool = False) -> None:
        """Put up every slot that is not settled and has no live trial; `points` are the params of a grid's slots.

        Who has just failed a trial does so `at_once`; others when the slot lacks one at two looks in a row, lest all do it.
        """
        lacking = [slot for slot in self.slots() if slot.live is None and slot.result is None]
        for slot in lacking:
            if at_once or slot.number in self._lacking:
                # Where a worker died the params are known, and the trial to try again is that one.
                tried = next((t.params for t in reversed(slot.trials) if t.params), {})
                put_up(self.storage, self.name, {slot.number: points[slot.number] if points else tried})
        self._lacking = {slot.number for slot in lacking}

    def claim(self, worker: str) -> "tuple[int, FrozenTrial] | None":
        """Take a waiting trial: its id in the storage and the trial; None where there is none."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        for trial in self.storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.WAITING,)):
            id = self.storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            try:
                won = self.storage.set_trial_state_values(id, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                continue
            if not won:
                continue
            self.storage.set_trial_user_attr(id, WORKER, worker)
            slot = self.slots()[trial.user_attrs[SLOT]]
            if slot.result is None and (slot.live is None or slot.live.number == trial.number):
                return id, self.storage.get_trial(id)
            self.fail(id, DUPLICATE)
        return None

    def finish(self, id: int, state: str, loss: float | None) -> bool:
        """Settle a trial as COMPLETE or PRUNED; False where another worker has taken this one for dead."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return self.storage.set_trial_state_values(id, TrialState[state], None if loss is None else [loss])
        except UpdateFinishedTrialError:
            return False

    def fail(self, id: int, why: str | None = None) -> None:
        """Fail a trial, if nobody has, because of `why`; None is the death of its worker."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            if why is not None:
                self.storage.set_trial_user_attr(id, WHY, why)
            self.storage.set_trial_state_values(id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass

    def beat(self, id: int, count: int) -> bool:
        """Renew the lease of a running trial; False where it is no longer running."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            self.storage.set_trial_user_attr(id, BEAT, count)
        except UpdateFinishedTrialError:
            return False
        return True

    def reap(self) -> int:
        """Fail the running trials whose beat has stood still for `grace` seconds, by this object's own clock."""
        now, stale = time.monotonic(), []
        running = self._running()
        for trial in running:
            beat = trial.user_attrs.get(BEAT)
            before, since = self._beats.get(trial.number, (None, now))
            self._beats[trial.number] = (beat, since if before == beat else now)
            if now - self._beats[trial.number][1] > self.grace:
                stale.append(trial)
        self._beats = {trial.number: self._beats[trial.number] for trial in running}
        return self._fail_all(stale)

    def bury(self, worker: str, why: str | None = None) -> int:
        """Fail what `worker`, which is known to be dead, was running; returns how many trials."""
        return self._fail_all([trial for trial in self._running() if trial.user_attrs.get(WORKER) == worker], why)

    def _running(self) -> "list[FrozenTrial]":
        from optuna.trial import TrialState

        return self.storage.get_all_trials(self._id, deepcopy=False, states=(TrialState.RUNNING,))

    def _fail_all(self, trials: "Sequence[FrozenTrial]", why: str | None = None) -> int:
        for trial in trials:
            self.fail(self.storage.get_trial_id_from_study_id_trial_number(self._id, trial.number), why)
        return len(trials)


def create(url: str, name: str, settings: Mapping[str, Any], trials: int, points: Sequence[Params] = ()) -> None:
    """Create the study, or check that the one there has the same settings; more trials than it has extend it.

    Raises InputError for a database that cannot be reached and for another study of this name.
    """
    import optuna
    from optuna.study import StudyDirection

    storage = connect(url)
    try:
        id = storage.create_new_study([StudyDirection.MINIMIZE], name)
        storage.set_study_user_attr(id, "sweep", dict(settings))
        put_up(storage, name, {k: points[k] if points else {} for k in range(trials)})
    except optuna.exceptions.DuplicatedStudyError:
        id = storage.get_study_id_from_name(name)
        _wait_for_creation(storage, id)
    found = storage.get_study_user_attrs(id)
    if "sweep" not in found:
        if storage.get_all_trials(id):
            raise InputError(f"--name {name} is a study of something else than a sweep: name another study.")
        storage.set_study_user_attr(id, "sweep", dict(settings))
    saved, given = storage.get_study_user_attrs(id)["sweep"], dict(settings)
    names = sorted({*saved, *given})
    differing = [f"{n}: {saved.get(n)} there, {given.get(n)} now" for n in names if saved.get(n) != given.get(n)]
    if differing:
        raise InputError(f"--name {name} is another study ({'; '.join(differing)}): name another, or give its settings.")
    if trials < found.get("trials", 0):
        raise InputError(f"--trials must be at least {found['trials']}, which study {name} has already, got {trials}.")
    storage.set_study_user_attr(id, "trials", trials)


def put_up(storage: "RDBStorage", name: str, slots: Mapping[int, Params]) -> None:
    """Let trials of these slots wait, with these params; those that lack one are drawn when it runs."""
    import optuna

    study = optuna.load_study(study_name=name, storage=storage)
    for slot, params in slots.items():
        study.enqueue_trial(dict(params), user_attrs={SLOT: slot})


def _wait_for_creation(storage: "RDBStorage", id: int) -> None:
    """Until the machine that creates the study is done, or has done nothing for CREATION seconds."""
    seen, since = -1, time.monotonic()
    while "trials" not in storage.get_study_user_attrs(id) and time.monotonic() - since < CREATION:
        count = len(storage.get_all_trials(id, deepcopy=False))
        if count != seen:
            seen, since = count, time.monotonic()
        time.sleep(0.1)


def connect(url: str) -> "RDBStorage":
    """The database at `url`, its tables created. Raises InputError for one that cannot be reached."""
    import optuna
    from sqlalchemy import engine, exc

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        parsed = engine.make_url(url)
    except exc.ArgumentError:
        raise InputError(f"--storage takes a URL such as sqlite:///study.db or postgresql://host/name, got {url!r}.") from None
    shown = parsed.render_as_string(hide_password=True)
    lite = parsed.get_backend_name() == "sqlite"
    if lite and parsed.database in (None, "", ":memory:"):
        raise InputError(f"--storage {shown} is one process's memory: name a file, sqlite:///study.db.")
    options = {"connect_args": {"timeout": PATIENCE}} if lite else {"pool_pre_ping": True}
    storage = _opened(url, shown, options)
    if lite:
        _serialise(storage.engine)
    return storage


def _opened(url: str, shown: str, options: Mapping[str, Any], attempts: int = 5) -> "RDBStorage":
    import optuna
    from sqlalchemy import exc

    try:
        # Optuna fills in {SCHEMA_VERSION}; other braces are part of a path.
        return optuna.storages.RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=dict(options))
    except ImportError as error:
        raise InputError(f"--storage {shown} needs a driver: {error.__cause__ or error}.") from None
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        # Two machines that create the tables at once: the second finds them at its next attempt.
        if attempts > 1 and "exists" in str(error).lower():
            time.sleep(0.5)
            return _opened(url, shown, options, attempts - 1)
        cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise InputError(f"--storage {shown} cannot be reached: {cause}.") from None


def _serialise(engine: Any) -> None:
    """Every transaction on SQLite takes the write lock first: reading a trial's state and changing it is one act.

    SQLite has no SELECT ... FOR UPDATE, which Optuna relies on for this, and Python's driver begins no transaction at a read.
    """
    from sqlalchemy import event

    event.listen(engine, "connect", lambda connection, record: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    # Connections of the table creation were made without.
    engine.dispose()
