"""The rows of an experiment: measured once, written whole, the same after a kill as without it."""

import json
import math

import pytest

from schatten.lab.errors import InputError
from schatten.lab.ledger import Ledger, environment, flat, key, raw_rows, rows_of

CONFIG = {"seeds": 2, "lrs": (0.1, math.inf), "data": "digits"}


def counted(found):
    """A computation that remembers how often it ran."""

    def compute():
        compute.times += 1
        return found

    compute.times = 0
    return compute


def test_a_row_is_case_and_findings_with_the_stamp_apart():
    row = Ledger(None, CONFIG).measure({"optimizer": "muon", "seed": 0}, lambda: {"loss": 1.5, "curve": [(1, 2.0)]})
    stamp = row.pop("run")
    assert row == {"optimizer": "muon", "seed": 0, "loss": 1.5, "curve": [[1, 2.0]]}
    assert stamp["config"] == {"seeds": 2, "lrs": [0.1, "inf"], "data": "digits"} and stamp["seconds"] >= 0
    assert {"versions", "device", "machine", "commit"} <= set(stamp) and stamp["versions"] == environment()["versions"]


def test_infinities_and_nan_come_back_as_floats_at_any_depth(tmp_path):
    found = {
        "loss": math.inf,
        "curve": [[1, -math.inf], [2, math.nan]],
        "per": {"a": {"b": math.inf}},
        "list": [{"x": math.inf}],
    }
    ledger = Ledger(tmp_path, CONFIG)
    for row in (ledger.measure({"limit": math.inf, "seed": 0}, lambda: found), *rows_of(tmp_path)):
        assert row["limit"] == row["loss"] == row["per"]["a"]["b"] == row["list"][0]["x"] == math.inf
        assert row["curve"][0] == [1, -math.inf] and math.isnan(row["curve"][1][1])
    # What is on disk is JSON, which has no infinity.
    json.loads((tmp_path / "rows.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_case_is_measured_once_in_a_run_and_has_one_row(tmp_path):
    ledger, compute = Ledger(tmp_path, CONFIG), counted({"loss": 1.0})
    assert ledger.measure({"seed": 0}, compute) == ledger.measure({"seed": 0}, compute)
    assert compute.times == 1 and len(ledger.rows) == len(rows_of(tmp_path)) == 1


def test_the_order_of_a_cases_entries_does_not_matter(tmp_path):
    compute = counted({"loss": 1.0})
    Ledger(tmp_path, CONFIG).measure({"a": 1, "b": (1, 2)}, compute)
    Ledger(tmp_path, CONFIG).measure({"b": [1, 2], "a": 1}, compute)
    assert compute.times == 1 and key({"a": 1, "b": 2}) == key({"b": 2, "a": 1}) != key({"a": 1, "b": 3})


def test_rows_are_those_asked_for_in_that_order(tmp_path):
    first = Ledger(tmp_path, CONFIG)
    for seed in range(3):
        first.measure({"seed": seed}, lambda seed=seed: {"loss": float(seed)})
    again = Ledger(tmp_path, CONFIG)
    assert again.rows == []
    for seed in (2, 0):
        again.measure({"seed": seed}, lambda: pytest.fail("measured anew"))
    assert [row["seed"] for row in again.rows] == [2, 0]
    assert [row["seed"] for row in rows_of(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("kept", [0, 1, 40, -1], ids=["none of it", "a bracket", "half", "all but the newline"])
def test_a_row_cut_short_by_a_kill_is_measured_anew_and_the_next_is_not_glued_to_it(tmp_path, kept):
    file = tmp_path / "rows.jsonl"
    ledger = Ledger(tmp_path, CONFIG)
    for seed in range(2):
        ledger.measure({"seed": seed}, lambda seed=seed: {"loss": float(seed)})
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[:kept])
    compute = counted({"loss": 1.0})
    Ledger(tmp_path, CONFIG).measure({"seed": 1}, compute)
    assert compute.times == (0 if kept == -1 else 1)
    Ledger(tmp_path, CONFIG).measure({"seed": 2}, lambda: {"loss": 2.0})
    assert [(row["seed"], row["loss"]) for row in rows_of(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert len(raw_rows(tmp_path)) == len(file.read_text().splitlines())


def test_a_failed_measurement_leaves_no_row(tmp_path):
    ledger = Ledger(tmp_path, CONFIG)
    with pytest.raises(ZeroDivisionError):
        ledger.measure({"seed": 0}, lambda: {"loss": 1 / 0})
    assert ledger.rows == [] == rows_of(tmp_path)


def test_other_settings_are_refused_by_name_and_again_replaces_them(tmp_path):
    Ledger(tmp_path, CONFIG).measure({"seed": 0}, lambda: {"loss": 1.0})
    with pytest.raises(InputError, match=r"data: digits there, text now.*--again"):
        Ledger(tmp_path, {**CONFIG, "data": "text"})
    with pytest.raises(InputError, match="new: None there, 1 now"):
        Ledger(tmp_path, {**CONFIG, "new": 1})
    ledger = Ledger(tmp_path, {**CONFIG, "data": "text"}, again=True)
    assert ledger.rows == rows_of(tmp_path) == [] and json.loads((tmp_path / "config.json").read_text())["data"] == "text"


def test_what_is_not_plain_is_refused():
    with pytest.raises(TypeError):
        Ledger(None, CONFIG).measure({"seed": 0}, lambda: {"loss": object()})


def test_checkpoints_of_different_cases_are_different_folders_with_names_a_file_system_takes(tmp_path):
    ledger = Ledger(tmp_path, CONFIG)
    cases = [{"lr": 0.1, "seed": 1}, {"lr": 0.1, "seed": 2}, {"lr": "0 1"}, {"lr": "0/1"}, {"other": "0/1"}]
    cases += [{"text": "x" * 300 + end} for end in "ab"]
    folders = [ledger.checkpoints(case) for case in cases]
    assert len(set(folders)) == len(cases)
    for folder in folders:
        folder.mkdir(parents=True)
        assert folder.parent == tmp_path / "checkpoints"
    assert ledger.checkpoints(dict(reversed(cases[0].items()))).name[-12:] == folders[0].name[-12:]
    assert Ledger(None, CONFIG).checkpoints(cases[0]) is None


def test_flat_keeps_words():
    assert flat({"case": {"name": "information"}, "found": {"verdict": "infinite"}, "run": {}})["verdict"] == "infinite"
