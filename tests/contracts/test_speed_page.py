"""The page of speeds says what the recorded files say: no more, no less, and what is not recorded by name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.speed_page import BEGIN, END, PAGE, RESULTS, main, page, section
from benchmarks.speed_tables import ABSENT, STAMP, TABLES, device, number, spread

FILES = sorted({file for table in TABLES for file in table.files})
RECORDED = [file for file in FILES if (RESULTS / file).exists()]


@pytest.fixture
def results(tmp_path):
    """A copy of the recorded files, to be changed."""
    for file in RECORDED:
        shutil.copy(RESULTS / file, tmp_path)
    return tmp_path


def tables(results):
    return page(results, PAGE.read_text())


def edit(path, change):
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))


def test_the_page_says_what_the_files_say():
    assert tables(RESULTS) == PAGE.read_text(), "run: python benchmarks/speed_page.py"


def test_the_page_is_written_as_it_is_checked(results, tmp_path, capsys):
    out = tmp_path / "speed.md"
    with pytest.raises(SystemExit, match=r"speed\.md is not what"):
        main(["--results", str(results), "--out", str(out), "--check"])
    assert not out.exists()
    main(["--results", str(results), "--out", str(out)])
    assert out.read_text() == PAGE.read_text()
    main(["--results", str(results), "--out", str(out), "--check"])
    edit(results / "step_time.json", lambda run: run.update(commit="0123abc"))
    with pytest.raises(SystemExit, match=r"run python benchmarks/speed_page\.py"):
        main(["--results", str(results), "--out", str(out), "--check"])


def test_times_that_change_change_the_page(results):
    def slower(run):
        times = run["optimizers"]["torch.optim.Muon"]["milliseconds"]
        times[:] = [10 * t for t in times]

    edit(results / "step_time.json", slower)
    assert tables(results) != PAGE.read_text()


def test_the_order_of_keys_in_a_file_changes_nothing_of_sorted_rows(results):
    def reversed_rows(run):
        run["optimizers"] = dict(reversed(run["optimizers"].items()))

    edit(results / "step_time.json", reversed_rows)
    assert tables(results) == PAGE.read_text()


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_there_is_named_with_the_command_that_writes_it(results, file):
    (results / file).unlink(missing_ok=True)
    text = tables(results)
    for table in TABLES:
        if file in table.files:
            line = f"**No {table.files[file]} is recorded yet**: `{table.command}` prints one and writes `benchmarks/results/{file}`."
            assert line in section(table, results) and line in text


def test_without_any_file_there_is_no_number_of_a_run(tmp_path):
    text = tables(tmp_path)
    assert "|" not in text.split(BEGIN)[1].replace("||", "")
    assert text.count("is recorded yet") == sum(len(table.files) for table in TABLES)


@pytest.mark.parametrize("file", RECORDED)
def test_keys_that_a_file_of_an_older_commit_lacks_become_dashes(results, file):
    """Without any one key, at any depth, there still is a page."""
    whole = json.loads((results / file).read_text())
    for path in sorted(paths(whole)):
        run = json.loads(json.dumps(whole))
        inside = run
        for key in path[:-1]:
            inside = inside[key]
        del inside[path[-1]]
        (results / file).write_text(json.dumps(run))
        for table in TABLES:
            if file in table.files:
                assert widths(section(table, results)) <= {len(table.columns)}, path


def paths(run):
    """The keys of a file, with those of the first few rows of what has many."""
    found = set()
    for key, value in run.items():
        found.add((key,))
        if isinstance(value, dict):
            some = dict(list(value.items())[:2])
            found |= {(key, *path) for path in paths(some)}
    return found


def widths(text):
    """The numbers of cells in the lines of a table."""
    return {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in text.splitlines() if line.startswith("|")}


def test_every_row_ends_in_device_torch_and_commit(results):
    for table in TABLES:
        assert table.columns[-3:] == STAMP
        for file in table.files:
            if file in RECORDED:
                run = json.loads((results / file).read_text())
                rows = table.rows(run)
                assert rows and all(row[-3:] == [device(run), run["torch"], run["commit"]] for row in rows), file
                assert all(len(row) == len(table.columns) for row in rows)


def test_a_run_without_device_is_one_of_a_cpu_and_a_gpu_is_named():
    assert device({"cores": 2, "threads": 2, "machine": "x86_64"}) == "cpu, 2 cores, x86_64"
    assert device({"device": "cpu", "cores": 8, "threads": 1}) == "cpu, 8 cores, 1 thread"
    assert device({"device": "NVIDIA H100 80GB HBM3", "cores": 16}) == "NVIDIA H100 80GB HBM3"
    assert device({}) == "cpu"


def test_medians_come_with_quartiles_and_few_times_with_their_range():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "4.00 (2.00 - 6.00)"
    assert spread([1.0, 2.0]) == "1.50 (1.00 - 2.00)"
    assert spread([3.0]) == "3.00"
    assert spread([]) == spread(None) == number(None) == ABSENT
    assert [number(x) for x in (0.123, 12.34, 1234.5)] == ["0.12", "12.3", "1234"]


def test_a_page_without_marks_is_refused():
    for text in ("# Speed\n", f"{END}{BEGIN}", BEGIN):
        with pytest.raises(ValueError, match="needs the lines <!-- tables --> and <!-- /tables -->"):
            page(RESULTS, text)


def test_no_path_of_a_machine_is_on_the_page():
    text = PAGE.read_text()
    for place in (str(Path.home()), str(RESULTS.parents[1].resolve())):
        assert place == "/" or place not in text
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|data|opt)/", text)
