"""`schatten lab`: experiments are found by the folder's listing, flags are the fields of a Config, runs go on where they were.

The commands run on a small experiment of their own, a file in a folder that is added to the package's.
"""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

from schatten import cli
from schatten.lab import experiments, lab_commands
from schatten.lab.experiment import Experiment

TOY = '''"""Is twice a number larger? A question of its own.

All settings are ours.
"""
from dataclasses import dataclass

from schatten.lab.experiment import Experiment, option, verdict


@dataclass(frozen=True)
class Config:
    seeds: int = 2
    size: int = option(3, "How many entries.")
    share: float = option(0.5, "A share.")
    data: str = option("digits", "A name.")
    strict: bool = option(True, "A switch.")
    grid: tuple[float, ...] = option((1.0, 2.0), "Numbers.")
    limit: int | None = option(None, "A number, or nothing.")


def run(config, ledger):
    for number in config.grid:
        for seed in range(config.seeds):
            case = {"number": number, "seed": seed}
            def compute(number=number, seed=seed):
                measured.append((number, seed))
                if number < 0:
                    raise KeyboardInterrupt
                return {"twice": 2 * number + seed, "curve": [1.0, float("inf")]}
            ledger.measure(case, compute)


def check(rows):
    larger = [row["twice"] > row["number"] for row in rows]
    return [verdict("twice a number", "larger", f"{sum(larger)} of {len(larger)}", all(larger), "exact arithmetic")]


measured = []
EXPERIMENT = Experiment("a made-up paper", Config(), Config(size=300), run, check)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The experiment above, as if its file lay in the folder; its `measured` are the cases that were computed."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy_one.py").write_text(TOY)
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "schatten.lab.experiments.toy_one", raising=False)
    importlib.invalidate_caches()
    module = importlib.import_module("schatten.lab.experiments.toy_one")
    yield module
    sys.modules.pop("schatten.lab.experiments.toy_one", None)
    vars(experiments).pop("toy_one", None)


@pytest.fixture
def lab(monkeypatch, capsys):
    """`lab(*arguments)`: exit code and output of `schatten lab`."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["schatten", "lab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    return run


def rows(out, name="toy-one"):
    return [json.loads(line) for line in (out / name / "rows.jsonl").read_text().splitlines()]


def test_every_file_of_the_folder_is_listed_with_its_question(lab, toy):
    files = {module.name.replace("_", "-") for module in pkgutil.iter_modules(experiments.__path__)}
    code, printed = lab("list")
    text = " ".join(printed.out.split())
    assert code == 0 and {"fanions", "toy-one"} <= files == set(experiments.names())
    for name in files:
        experiment = experiments.load(name)
        assert isinstance(experiment, Experiment)
        assert f"{name} {' '.join(experiments.claim(name).split())} ({experiment.source})" in text


def test_a_run_shows_verdicts_and_says_where_the_rows_are(tmp_path, lab, toy):
    code, printed = lab("run", "toy-one", f"--out={tmp_path / 'new' / 'folder'}")
    assert code == 0 and toy.measured == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]
    assert "4 of 4" in printed.out and "reproduced" in printed.out
    file = tmp_path / "new" / "folder" / "toy-one" / "rows.jsonl"
    assert str(file) in printed.out.replace("\n", "")
    first = rows(file.parents[1])[0]
    assert first["case"] == {"number": 1.0, "seed": 0} and first["found"] == {"twice": 2.0, "curve": [1.0, "inf"]}
    stamp = first["run"]
    assert stamp["config"]["size"] == 3 and stamp["versions"]["torch"] and stamp["device"] and stamp["seconds"] >= 0


def test_flags_are_the_fields_of_the_config(tmp_path, lab, toy):
    flags = ("--seeds=1", "--size=7", "--share=0.25", "--data=here", "--no-strict", "--grid=3,4.5", "--limit=9")
    assert lab("run", "toy-one", *flags, f"--out={tmp_path}")[0] == 0
    saved = json.loads((tmp_path / "toy-one" / "config.json").read_text())
    expected = {"seeds": 1, "size": 7, "share": 0.25, "data": "here", "strict": False, "grid": [3.0, 4.5], "limit": 9}
    assert saved == expected
    assert [row["case"]["number"] for row in rows(tmp_path)] == [3.0, 4.5]


def test_full_takes_the_published_settings_but_for_what_is_given(tmp_path, lab, toy):
    assert lab("run", "toy-one", "--full", "--seeds=1", f"--out={tmp_path}")[0] == 0
    saved = json.loads((tmp_path / "toy-one" / "config.json").read_text())
    assert (saved["size"], saved["seeds"], saved["share"]) == (300, 1, 0.5)


def test_help_shows_the_question_the_settings_and_both_defaults(lab, toy):
    code, printed = lab("run", "toy-one", "--help")
    text = " ".join(printed.out.split())
    assert code == 0 and "Is twice a number larger?" in text and "All settings are ours." in text
    assert "--size <int> How many entries. Default 3, with --full 300." in text
    assert "--grid" in text and "Numbers. Default 1.0,2.0." in text and "--no-strict" in text


def test_finished_cases_are_not_measured_again(tmp_path, lab, toy):
    lab("run", "toy-one", f"--out={tmp_path}")
    before = (tmp_path / "toy-one" / "rows.jsonl").read_text()
    code, printed = lab("run", "toy-one", f"--out={tmp_path}")
    assert code == 0 and len(toy.measured) == 4 and "4 of 4" in printed.out
    assert (tmp_path / "toy-one" / "rows.jsonl").read_text() == before


def test_a_killed_run_goes_on_with_the_case_it_was_at(tmp_path, lab, toy):
    lab("run", "toy-one", f"--out={tmp_path}")
    file = tmp_path / "toy-one" / "rows.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # Killed while the third of four lines was written.
    file.write_text("".join(lines[:2]) + lines[2][:40])
    toy.measured.clear()
    code, printed = lab("run", "toy-one", f"--out={tmp_path}")
    assert code == 0 and toy.measured == [(2.0, 0), (2.0, 1)] and "4 of 4" in printed.out
    toy.measured.clear()
    assert lab("run", "toy-one", f"--out={tmp_path}")[0] == 0 and toy.measured == []


def test_again_measures_all_anew_even_with_other_settings(tmp_path, lab, toy):
    lab("run", "toy-one", f"--out={tmp_path}")
    code, _ = lab("run", "toy-one", "--grid=5", "--again", f"--out={tmp_path}")
    assert code == 0 and [row["case"]["number"] for row in rows(tmp_path)] == [5.0, 5.0]


def test_rows_of_other_settings_are_refused_and_kept(tmp_path, lab, toy):
    lab("run", "toy-one", f"--out={tmp_path}")
    before = rows(tmp_path)
    code, printed = lab("run", "toy-one", "--size=4", f"--out={tmp_path}")
    assert code == 2 and "size: 3 there, 4 now" in printed.err and "--again" in printed.err
    assert rows(tmp_path) == before


@pytest.fixture
def commands(monkeypatch):
    """The commands that `--all` starts, which end at once; those of an experiment in `commands.bad` with an error."""

    class Commands(list):
        bad: tuple[str, ...] = ()

        def run(self, command, **options):
            self.append(command[1:])
            failed = any(name in command for name in self.bad)
            return subprocess.CompletedProcess(command, 2 if failed else 0, " a table", "what went wrong" if failed else "")

    started = Commands()
    monkeypatch.setattr(lab_commands.subprocess, "run", started.run)
    return started


def test_all_runs_every_experiment_in_a_process_of_its_own(tmp_path, lab, toy, commands):
    code, printed = lab("run", "--all", "--seeds=1", "--full", "--again", f"--out={tmp_path}")
    flags = ["--full", "--again", "--out", str(tmp_path), "--seeds", "1"]
    assert code == 0 and commands == [["-m", "schatten", "lab", "run", name, *flags] for name in experiments.names()]
    assert all(f"{name}: finished" in printed.out for name in experiments.names())


def test_all_goes_on_after_a_failure_and_names_it(tmp_path, lab, toy, commands):
    commands.bad = ("fanions",)
    code, printed = lab("run", "--all", f"--out={tmp_path}")
    assert code == 2 and len(commands) == len(experiments.names())
    assert "fanions: failed, exit code 2" in printed.out and "what went wrong" in printed.out
    assert "toy-one: finished" in printed.out and "fanions did not finish" in printed.err and "toy-one" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fanion"], "no 'fanion': known are"),
        ([], "NAME is missing: name an experiment ("),
        (["toy-one", "--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--all", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["toy-one", "--seeds=some"], "--seeds"),
        (["toy-one", "--grid=1,b"], "--grid takes float values separated by commas, got '1,b'"),
        (["toy-one", "--widht=3"], "--widht"),
        (["toy-one", "more"], "more"),
        (["toy-one", "--out={file}"], "is a file or in one"),
        (["toy-one", "--out={file}/deeper"], "is a file or in one"),
    ],
)
def test_wrong_input_ends_with_exit_code_two(tmp_path, lab, toy, arguments, message):
    file = tmp_path / "file"
    file.write_text("mine")
    code, printed = lab("run", *(a.format(file=file) for a in arguments))
    assert code == 2
    assert message in " ".join(printed.err.split())
    assert "Traceback" not in printed.err and toy.measured == []
    assert file.read_text() == "mine"
