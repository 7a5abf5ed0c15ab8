"""`schatten sweep` as typed: workers that are killed, a study taken up again, its report, and every kind of wrong input."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from schatten import cli

GRID = ("--space", "lr=1e-3,3e-3,0.01,0.03,0.1,1e20", "--space", "weight_decay=0,0.1", "--sampler", "grid")
# 12 x 5 = 60 points.
SIXTY = (*GRID, "--space", "aux_lr=1e-4,1e-3,3e-3,0.01,0.1", "--steps", "3", "--width", "8", "--layers", "1")
TINY = ("--steps", "4", "--width", "8", "--layers", "1", "--batch", "8")


@pytest.fixture
def out():
    """A run folder in memory: a disk would be waited for at every transaction."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "sweep"


def start(out, *arguments):
    command = [sys.executable, "-m", "schatten", "sweep", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def sweep(monkeypatch, capsys, out, *arguments):
    """The command in this process: its exit code, and what it printed and said."""
    monkeypatch.setattr(sys, "argv", ["schatten", "sweep", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def states(out):
    """Trials by state, read without taking the lock; none while there is no database yet."""
    try:
        with sqlite3.connect(f"file:{out}/study.db?mode=ro", uri=True) as database:
            return Counter(state for (state,) in database.execute("SELECT state FROM trials"))
    except sqlite3.OperationalError:
        return Counter()


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process):
    """Its worker processes; multiprocessing starts a tracker of resources beside them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            line = (folder / "cmdline").read_text()
        except OSError:
            continue
        if parent == process.pid and "spawn_main" in line:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker to kill in /proc")
def test_sixty_trials_on_two_workers_with_one_killed_midway_are_none_lost_and_none_run_twice(out):
    process = start(out, *SIXTY, "--jobs", "2")
    wait_for(lambda: states(out)["COMPLETE"] >= 10 and states(out)["RUNNING"], process)
    os.kill(children(process)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "60 of 60 trials" in said
    trials = optuna.load_study(study_name="digits-muon", storage=f"sqlite:///{out}/study.db").trials
    complete = [tuple(sorted(t.params.items())) for t in trials if t.state.name == "COMPLETE"]
    assert len(complete) == len(set(complete)) == 60
    assert sorted(t.user_attrs["slot"] for t in trials if t.state.name == "COMPLETE") == list(range(60))
    # The kill may fall between two trials, when nothing is lost; else one trial failed, and its slot was tried once more.
    failed = [t.user_attrs["slot"] for t in trials if t.state.name == "FAIL"]
    assert len(trials) == 60 + len(failed) and len(failed) <= 1
    assert len({t.user_attrs["worker"] for t in trials if t.state.name == "COMPLETE"}) >= 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers to kill in /proc")
def test_the_same_command_takes_up_a_study_whose_every_process_was_killed(monkeypatch, capsys, out):
    settings = (*GRID, *TINY, "--grace", "1")
    process = start(out, *settings)
    wait_for(lambda: states(out)["COMPLETE"] >= 2 and states(out)["RUNNING"], process)
    process.kill()
    process.communicate()
    before = states(out)["COMPLETE"]
    assert before < 12
    code, said, _ = sweep(monkeypatch, capsys, out, *settings)
    assert code == 0
    assert said.count("trial ") >= 12 - before
    assert "12 of 12 trials" in said
    found = states(out)
    assert found["COMPLETE"] == 12 and found["FAIL"] <= 1 and found["RUNNING"] == 0


def test_the_report_shows_the_best_trial_the_pictures_and_what_diverged(monkeypatch, capsys, out):
    settings = (*GRID, *TINY)
    code, said, _ = sweep(monkeypatch, capsys, out, *settings)
    assert code == 0
    assert "12 of 12 trials: 10 complete, 2 diverged" in said
    best = next(line for line in said.splitlines() if line.startswith("best: "))
    page = (out / "report.html").read_text()
    assert best in page
    assert "Plotly.newPlot" in page and 'src="http' not in page, "the page must open offline"
    for name in ("lr_sensitivity", "parallel_coordinates"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # The finished study prints its result again and trains nothing.
    code, again, _ = sweep(monkeypatch, capsys, out, *settings)
    assert code == 0 and best in again
    assert not any(line.startswith("trial ") for line in again.splitlines())


def test_trials_share_a_study_through_a_storage_under_a_name(monkeypatch, capsys, out):
    out.mkdir()
    settings = (*TINY, "--space", "lr=1e-3:1e-1", "--space", "momentum=lin:0.8:0.99", "--trials", "3", "--seeds", "2")
    shared = ("--storage", f"sqlite:///{out}/shared.db", "--name", "ours", "--pruner", "halving")
    code, said, _ = sweep(monkeypatch, capsys, out / "here", *settings, *shared)
    assert code == 0 and "3 of 3 trials" in said
    code, said, _ = sweep(monkeypatch, capsys, out / "there", *settings, *shared)
    assert code == 0 and "3 of 3 trials" in said and (out / "there" / "report.html").exists()
    study = optuna.load_study(study_name="ours", storage=f"sqlite:///{out}/shared.db")
    assert study.user_attrs["sweep"]["space"]["momentum"] == {"low": 0.8, "high": 0.99, "log": False}
    assert len(study.trials) == 3


def test_names_lists_the_settings_of_an_optimizer(monkeypatch, capsys, out):
    code, said, _ = sweep(monkeypatch, capsys, out, "--optimizer", "adamw", "--names")
    assert code == 0
    assert said.split() == ["lr", "weight_decay", "beta1", "beta2", "eps"]


def test_gpt_is_tuned_on_text(monkeypatch, capsys, out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    small = ("--width", "32", "--layers", "1", "--context", "8", "--batch", "2", "--steps", "2")
    code, said, _ = sweep(
        monkeypatch, capsys, out, "--task", "gpt", "--data", str(text), "--space", "lr=1e-3,1e-2", "--sampler", "grid", *small
    )
    assert code == 0 and "2 of 2 trials: 2 complete" in said
    settings = json.loads(
        sqlite3.connect(out / "study.db").execute("SELECT value_json FROM study_user_attributes").fetchone()[0]
    )
    assert str(text) not in json.dumps(settings), "where the data lies differs between machines; its fingerprint does not"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--space is missing"),
        (("--space", "lr"), "--space takes NAME=VALUES"),
        (("--space", "lr=fast"), "--space takes finite numbers .* got 'fast'"),
        (("--space", "lr=1e-3:inf"), "--space takes finite numbers .* got 'inf'"),
        (("--space", "lr=1e-1:1e-3"), "--space needs LOW below HIGH"),
        (("--space", "lr=0:1"), "logarithmic span, which needs LOW above 0"),
        (("--space", "lr=1e-3:1e-2:1e-1"), "--space takes finite numbers"),
        (("--space", "lr=0.1,1e-1"), "--space needs different values"),
        (("--space", "lr=1,2", "--space", "lr=3"), "--space has lr twice"),
        (
            ("--space", "lr=1e-3:1", "--space", "warp=1,2"),
            "--space has warp, which muon lacks: it has lr, weight_decay, momentum",
        ),
        (("--space", "aux_lr=1e-3:1", "--optimizer", "adamw"), "--space has aux_lr, which adamw lacks"),
        (("--space", "weight_decay=0,0.1", "--optimizer", "hyperball"), "--space has weight_decay, which hyperball lacks"),
        (("--space", "momentum=0.9,1.5"), r"--space momentum cannot be 1.5 for muon: momentum must lie in \[0, 1\)"),
        (("--space", "lr=lin:-1:1"), "--space lr cannot be -1 for muon"),
        (("--space", "lr=1,2", "--optimizer", "moun"), "--optimizers has no 'moun'"),
        (("--space", "lr=1,2", "--task", "chess"), "--task must be one of digits, gpt, got 'chess'"),
        (("--space", "lr=1,2", "--sampler", "best"), "--sampler must be one of tpe, random, grid"),
        (("--space", "lr=1,2", "--pruner", "shears"), "--pruner must be one of halving, none"),
        (("--space", "lr=1e-3:1", "--sampler", "grid"), "--sampler grid tries every point of lists, but lr is a span"),
        (("--space", "lr=1,2", "--sampler", "grid", "--trials", "3"), "tries all 2 points of the space: leave out --trials 3"),
        (("--space", "lr=1,2", "--trials", "0"), "--trials must be at least 1, got 0"),
        (("--space", "lr=1,2", "--jobs", "0"), "--jobs must be at least 1, got 0"),
        (("--space", "lr=1,2", "--steps", "0"), "--steps must be at least 1, got 0"),
        (("--space", "lr=1,2", "--grace", "0"), "--grace must be at least 1 second, got 0"),
        (("--space", "lr=1,2", "--data", "/no/such/thing"), "--data /no/such/thing is no folder"),
        (("--space", "lr=1,2", "--task", "gpt", "--width", "40"), "--width must be a multiple of 32"),
        (("--space", "lr=1,2", "--storage", "sqlite:////no/such/folder/study.db"), "--storage .* cannot be reached"),
        (("--space", "lr=1,2", "--storage", "study.db"), "--storage takes a URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_ends_with_one_line_before_anything_runs(monkeypatch, capsys, out, arguments, message):
    code, said, error = sweep(monkeypatch, capsys, out, *arguments)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert said == ""
    assert not states(out)


def test_another_study_of_the_name_in_the_folder_is_refused(monkeypatch, capsys, out):
    one = ("--space", "lr=1e-2", "--sampler", "grid", *TINY)
    assert sweep(monkeypatch, capsys, out, *one)[0] == 0
    code, _, error = sweep(monkeypatch, capsys, out, "--space", "lr=1e-2,1e-1", "--sampler", "grid", *TINY)
    assert code == 2 and error.count("\n") == 1
    assert "--name digits-muon is another study (space: {'lr': [0.01]} there, {'lr': [0.01, 0.1]} now)" in error


def test_a_run_folder_that_is_a_file_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, error = sweep(monkeypatch, capsys, tmp_path / "file", "--space", "lr=1,2")
    assert code == 2 and "is a file or in one" in error
