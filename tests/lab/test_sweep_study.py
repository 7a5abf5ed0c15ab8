"""A study that several workers share: every slot is settled once, whoever dies and whoever asks at the same time."""

import math
import multiprocessing
import tempfile
import threading
from pathlib import Path

import optuna
import pytest

from schatten.lab import sweep_study, sweep_worker
from schatten.lab.errors import InputError
from schatten.lab.sweep import Sweep
from schatten.lab.sweep_results import results, summary
from schatten.lab.sweep_space import parse
from schatten.lab.sweep_study import ATTEMPTS, Study, create

GRID = ("lr=1e-3,1e-2,1e-1", "weight_decay=0,0.1")


def bowl(params, report):
    return (math.log10(params["lr"]) + 2) ** 2 + params.get("weight_decay", 0.0)


def quiet(line):
    pass


@pytest.fixture
def url():
    """A database in memory that processes share: a disk would be waited for at every transaction."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield f"sqlite:///{folder}/study.db"


def begun(url, *entries, grace=60.0, **settings):
    """A study in the database and its settings."""
    sweep = Sweep(space=parse(entries or GRID), **({} if entries else {"sampler": "grid"}), **settings)
    create(url, "s", sweep.plain("data"), sweep.trials, sweep_worker.points(sweep))
    return Study(url, "s", grace=grace), sweep


def states(url):
    trials = optuna.load_study(study_name="s", storage=url).trials
    return [(t.user_attrs["slot"], t.state.name) for t in trials]


def test_a_grid_is_tried_point_by_point_each_once(url):
    study, sweep = begun(url)
    sweep_worker.work(study, sweep, bowl, say=quiet)
    found = results(study.slots())
    assert {tuple(r.params.values()) for r in found} == {(lr, d) for lr in (1e-3, 1e-2, 1e-1) for d in (0.0, 0.1)}
    assert states(url) == [(slot, "COMPLETE") for slot in range(6)]
    assert found[0].params == {"lr": 1e-2, "weight_decay": 0.0} and found[0].loss == 0.0
    assert summary(found, 6) == "6 of 6 trials: 6 complete"


def test_a_finished_study_runs_nothing(url):
    study, sweep = begun(url)
    sweep_worker.work(study, sweep, bowl, say=quiet)
    sweep_worker.work(Study(url, "s", grace=60), sweep, lambda p, r: pytest.fail("ran a finished trial"), say=quiet)


def test_a_random_study_does_not_depend_on_who_runs_which_trial(url):
    found = []
    for name, count in (("a", 1), ("b", 3)):
        study, sweep = begun(f"{url}.{name}", "lr=1e-4:1e-1", "weight_decay=0,0.1", trials=9, sampler="random")
        in_threads(study, sweep, bowl, count)
        found.append({r.slot: r.params for r in results(study.slots())})
    assert found[0] == found[1]
    assert len({tuple(p.values()) for p in found[0].values()}) == 9


def in_threads(study, sweep, objective, count):
    def run():
        own = Study(study.url, study.name, grace=study.grace)
        sweep_worker.work(own, sweep, objective, say=quiet)
        own.storage.engine.dispose()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def claim_all(url, barrier, queue):
    study = Study(url, "s", grace=60)
    barrier.wait()
    mine = []
    while (claimed := study.claim("w")) is not None:
        mine.append(claimed[1].user_attrs["slot"])
    queue.put(mine)


def test_workers_that_claim_at_once_never_get_the_same_trial(url):
    """Three processes race for 30 trials. With Optuna's own transactions on SQLite, several of them win some trials."""
    begun(url, "lr=1e-4:1e-1", trials=30)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=claim_all, args=(url, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    claimed = [slot for _ in processes for slot in queue.get(timeout=60)]
    for process in processes:
        process.join()
    assert sorted(claimed) == list(range(30))


def test_a_trial_whose_worker_died_is_tried_again_with_its_own_params(url):
    study, sweep = begun(url, "lr=1e-4:1e-1", trials=3)
    id, _ = study.claim("dead")
    view = optuna.load_study(study_name="s", storage=study.storage)
    view.get_trials()
    lr = optuna.Trial(view, id).suggest_float("lr", 1e-4, 1e-1, log=True)
    assert study.bury("dead") == 1
    sweep_worker.work(study, sweep, bowl, say=quiet)
    again = study.slots()[0]
    assert [t.state.name for t in again.trials] == ["FAIL", "COMPLETE"]
    assert again.result.params["lr"] == lr
    assert summary(results(study.slots()), 3) == "3 of 3 trials: 3 complete; 1 tried again after a worker died"


def test_a_worker_without_a_sign_of_life_loses_its_trial_after_the_grace_and_not_before(url, monkeypatch):
    study, _ = begun(url, grace=10.0)
    id, _ = study.claim("asleep")
    clock = [100.0]
    monkeypatch.setattr(sweep_study.time, "monotonic", lambda: clock[0])
    assert study.reap() == 0
    clock[0] = 109.0
    assert study.reap() == 0
    assert study.beat(id, 1)
    clock[0] = 118.0
    assert study.reap() == 0, "it has shown a sign of life"
    clock[0] = 129.0
    assert study.reap() == 1
    assert not study.beat(id, 2)


def test_a_trial_whose_worker_died_before_its_first_sign_is_reaped_too(url, monkeypatch):
    """Optuna's heartbeat leaves such a trial running for ever."""
    study, _ = begun(url, grace=10.0)
    id = study.storage.get_trial_id_from_study_id_trial_number(1, 0)
    study.storage.set_trial_state_values(id, optuna.trial.TrialState.RUNNING)
    clock = [0.0]
    monkeypatch.setattr(sweep_study.time, "monotonic", lambda: clock[0])
    assert study.reap() == 0
    clock[0] = 11.0
    assert study.reap() == 1


def test_a_worker_taken_for_dead_cannot_settle_its_trial(url):
    study, sweep = begun(url)
    id, _ = study.claim("slow")
    study.bury("slow")
    study.fill(sweep_worker.points(sweep), at_once=True)
    assert not study.finish(id, "COMPLETE", 0.123)
    sweep_worker.work(study, sweep, bowl, say=quiet)
    assert 0.123 not in [r.loss for r in results(study.slots())]
    assert len(results(study.slots())) == 6


def test_a_worker_taken_for_dead_stops_at_its_next_evaluation(url):
    study, sweep = begun(url, "lr=1e-2", sampler="grid")
    said, calls = [], []

    def objective(params, report):
        calls.append(params)
        if len(calls) == 1:
            Study(url, "s", grace=60).bury("sleeper")
        report(1, 0.5)
        return 0.25

    sweep_worker.work(study, sweep, objective, worker="sleeper", say=said.append)
    assert "given back" in said[0] and "loss 0.25" in said[1]
    assert states(url) == [(0, "FAIL"), (0, "COMPLETE")]


def test_two_workers_that_fill_at_once_leave_no_slot_that_runs_twice(url):
    study, sweep = begun(url)
    points = sweep_worker.points(sweep)
    sweep_study.put_up(study.storage, "s", dict(enumerate(points)))
    ran = []
    sweep_worker.work(study, sweep, lambda p, r: ran.append(tuple(p.values())) or 0.0, say=quiet)
    assert len(ran) == len(set(ran)) == 6
    assert sorted(states(url)) == sorted([(slot, s) for slot in range(6) for s in ("COMPLETE", "FAIL")])


def test_a_crash_between_failing_a_trial_and_putting_it_up_again_loses_nothing(url):
    study, sweep = begun(url)
    id, _ = study.claim("dead")
    study.fail(id)
    other = Study(url, "s", grace=60)
    sweep_worker.work(other, sweep, bowl, say=quiet)
    assert other.finished() and len(results(other.slots())) == 6


def test_a_study_whose_creator_died_halfway_is_completed(url, monkeypatch):
    put_up = sweep_study.put_up

    def dies(storage, name, slots):
        put_up(storage, name, {2: slots[2]})
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_study, "put_up", dies)
    monkeypatch.setattr(sweep_study, "CREATION", 0.1)
    with pytest.raises(KeyboardInterrupt):
        begun(url)
    monkeypatch.setattr(sweep_study, "put_up", put_up)
    study, sweep = begun(url)
    sweep_worker.work(study, sweep, bowl, say=quiet)
    assert sorted(states(url)) == [(slot, "COMPLETE") for slot in range(6)]


def test_a_slot_that_another_worker_is_about_to_put_up_is_left_to_it(url):
    study, sweep = begun(url)
    points = sweep_worker.points(sweep)
    study.claim("dead")
    study.bury("dead")
    onlooker = Study(url, "s", grace=60)
    onlooker.fill(points)
    study.fill(points, at_once=True)
    onlooker.fill(points)
    assert states(url).count((0, "WAITING")) == 1


def test_a_trial_that_takes_every_worker_with_it_is_given_up(url):
    study, sweep = begun(url)
    for _ in range(ATTEMPTS):
        study.fill(sweep_worker.points(sweep), at_once=True)
        waiting = [t for t in study.slots()[0].trials if t.state.name == "WAITING"]
        study.storage.set_trial_state_values(
            study.storage.get_trial_id_from_study_id_trial_number(1, waiting[0].number), optuna.trial.TrialState.RUNNING
        )
        study.fail(study.storage.get_trial_id_from_study_id_trial_number(1, waiting[0].number))
    sweep_worker.work(study, sweep, bowl, say=quiet)
    lost = results(study.slots())[-1]
    assert (lost.state, lost.loss, lost.deaths) == ("failed", math.inf, ATTEMPTS)
    assert "at each of 3 attempts" in lost.note
    assert states(url).count((0, "FAIL")) == ATTEMPTS


def test_a_trial_that_was_given_back_is_no_attempt(url):
    study, sweep = begun(url, "lr=1e-2", sampler="grid")
    for _ in range(ATTEMPTS + 1):
        with pytest.raises(KeyboardInterrupt):
            sweep_worker.work(study, sweep, interrupted, say=quiet)
    sweep_worker.work(study, sweep, bowl, say=quiet)
    assert states(url) == [*[(0, "FAIL")] * (ATTEMPTS + 1), (0, "COMPLETE")]


def interrupted(params, report):
    raise KeyboardInterrupt


def test_an_exception_at_one_point_fails_that_trial_alone(url):
    study, sweep = begun(url)
    said = []

    def objective(params, report):
        if params["lr"] == 1e-2:
            raise ArithmeticError("no such number")
        return 1.0

    sweep_worker.work(study, sweep, objective, say=said.append)
    failed = [r for r in results(study.slots()) if r.state == "failed"]
    assert len(failed) == 2 and study.finished()
    assert "ArithmeticError at test_sweep_study.py" in failed[0].note and "no such number" in failed[0].note
    assert any("failed: lr 0.01" in line for line in said)
    assert states(url).count((failed[0].slot, "FAIL")) == 1, "it would raise again"


def test_a_diverged_trial_is_inf_and_no_failure(url):
    study, sweep = begun(url)
    sweep_worker.work(study, sweep, lambda p, r: math.inf if p["lr"] > 1e-2 else p["lr"], say=quiet)
    found = results(study.slots())
    assert [r.state for r in found] == ["complete"] * 4 + ["diverged"] * 2
    assert [r.loss for r in found[4:]] == [math.inf] * 2


def test_halving_ends_poor_trials_early_and_lets_the_best_finish(url):
    study, sweep = begun(url, "lr=1e-4:1e-1", trials=18, sampler="random", pruner="halving", steps=90, eval_every=5)
    steps = {}

    def objective(params, report):
        loss = bowl(params, report)
        for step in range(5, 91, 5):
            steps[params["lr"]] = step
            report(step, loss)
        return loss

    sweep_worker.work(study, sweep, objective, say=quiet)
    found = results(study.slots())
    complete, pruned = ([r for r in found if r.state == state] for state in ("complete", "pruned"))
    assert len(complete) + len(pruned) == 18 and 2 <= len(complete) <= 8
    assert {steps[r.params["lr"]] for r in complete} == {90}
    # The first evaluations after a ninth and a third of the steps; never the last one.
    assert {steps[r.params["lr"]] for r in pruned} <= {15, 35}
    best = min(found, key=lambda r: bowl(r.params, None))
    assert best.state == "complete"


def test_more_trials_extend_a_study_and_fewer_are_refused(url):
    entries = ("lr=1e-4:1e-1",)
    study, sweep = begun(url, *entries, trials=4, sampler="random")
    sweep_worker.work(study, sweep, bowl, say=quiet)
    study, sweep = begun(url, *entries, trials=6, sampler="random")
    sweep_worker.work(study, sweep, bowl, say=quiet)
    assert states(url) == [(slot, "COMPLETE") for slot in range(6)]
    with pytest.raises(InputError, match="--trials must be at least 6, which study s has already, got 5"):
        begun(url, *entries, trials=5, sampler="random")


def test_another_study_of_the_same_name_is_refused_with_what_differs(url):
    begun(url)
    with pytest.raises(InputError, match=r"--name s is another study \(.*optimizer: muon there, adamw now"):
        begun(url, optimizer="adamw")
    with pytest.raises(InputError, match=r"space: \{'lr': .* there"):
        begun(url, "lr=1e-3,1e-2", sampler="grid")
    optuna.create_study(study_name="t", storage=url).add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(InputError, match="--name t is a study of something else"):
        create(url, "t", {}, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("nonsense", "--storage takes a URL"),
        ("sqlite://", "one process's memory"),
        ("sqlite:////no/such/folder/study.db", "cannot be reached: unable to open database file"),
        ("postgresql+pg8001://me:secret@nowhere/db", "cannot be reached|needs a driver"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_named_without_its_password(wrong, message):
    with pytest.raises(InputError, match=message) as caught:
        create(wrong, "s", {}, 1)
    assert "secret" not in str(caught.value)


def test_a_path_with_braces_is_a_path(tmp_path):
    folder = tmp_path / "{SCHEMA_VERSION}"
    folder.mkdir()
    create(f"sqlite:///{folder}/study.db", "s", {}, 1)
    assert (folder / "study.db").exists()
