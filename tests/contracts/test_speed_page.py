"""The page of speeds says what the recorded files say: no more, no less, and what is not recorded by name."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.speed_page import BEGIN, END, PAGE, RESULTS, TABLES, main, page, recorded, section
from benchmarks.speed_parts.table import ABSENT, STAMP, device, number, spread

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
            said = f"**No {table.files[file]} is recorded yet**: `{table.command}` prints one"
            assert said in section(table, results) and said in text


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
                rows = table.rows(recorded(results, file))
                assert all(len(row) == len(table.columns) for row in rows)
                assert all(ABSENT not in row[-3:] for row in rows), file


GPU_RUN = {
    "device": "cuda",
    "machine": {"name": "A GPU", "torch": "2.9", "cores": 16, "threads": 8},
    "models": {
        "gpt2": {
            "title": "GPT-2 small",
            "dtype": "float32",
            "commit": "0123abc",
            "peak_teraflops": 700.0,
            "bandwidth_gigabytes_per_second": 3000.0,
            "ceilings": {"before": None, "after": {"clocks": {"sm": "1980 MHz"}}},
            "floors": {"muon": {"milliseconds_whole": 2.0, "milliseconds_symmetric": 1.5}, "adamw": None},
            "rows": {
                "schatten.Muon, Triton": {
                    "note": "",
                    "error": None,
                    "milliseconds": {"median": 3.0, "low": 2.9, "high": 3.2, "all": [2.9, 3.0, 3.2]},
                    "host_milliseconds": 1.0,
                    "over_adamw": 2.0,
                    "over_reference": 1.0,
                    "over_floor_symmetric": 2.0,
                    "over_floor_whole": 1.5,
                    "effective_teraflops": 650.0,
                    "effective_over_peak": 0.93,
                    "extra_bytes": 1 << 28,
                },
                "another.Muon": {"note": "state in bf16", "error": "TypeError: a|b", "milliseconds": None},
            },
        }
    },
    "first_step": {
        "model": "gpt2",
        "kernels": "triton",
        "cold": {"first_seconds": 12.0, "second_seconds": 0.004, "error": None},
        "warm": {"first_seconds": None, "second_seconds": None, "error": "no end after 240 s"},
    },
    "targets": [
        {"target": "faster", "contender": "schatten.Muon", "model": "gpt2", "measured": 4.5, "limit": ">= 4", "met": True}
    ],
}

TRAINED = {
    "device": "A GPU",
    "torch": "2.9",
    "commit": "0123abc",
    "kernels": "triton",
    "model": {"parameters": 124_000_000},
    "settings": {"dtype": "bf16", "compiled": True},
    "optimizers": {
        "schatten.Muon": {
            "tokens_per_second": [1.0e5, 1.1e5, 1.2e5],
            "step_ms": [500, 510, 520],
            "optimizer_ms": [4.0, 5.0, 6.0],
            "optimizer_share": [0.008, 0.01, 0.012],
            "tokens": 1000,
            "validation_loss": 3.21,
            "peak_bytes": 1 << 30,
            "state_bytes": None,
        }
    },
}

VARIETY = {
    "kernel": "product",
    "target": 90,
    "registers": 168,
    "shared": 98304,
    "local": 0,
    "tensor_cores": "HGMMA",
    "seconds": 1,
}
COMPILED = {
    "torch": "2.9",
    "commit": "0123abc",
    "triton": "3.5",
    "first_step": {
        "sm_90": {"first_varieties": 9, "first_seconds": 5.5, "search_varieties": 20, "search_seconds": 12.5},
    },
    "varieties": [{**VARIETY, "target": 100}, VARIETY, {**VARIETY, "registers": 90, "tensor_cores": "", "seconds": 0.5}],
}

OWN = {
    "compile_kernels.json": "none: compiled alone | 2.9, triton 3.5 | 0123abc |",
    "gpu.json": "A GPU | 2.9 | 0123abc |",
    "train_gpt2.json": "A GPU | 2.9 | 0123abc |",
}


# What becomes of them, without the last three columns.
GPU_LINES = """\
| GPT-2 small | float32 | schatten.Muon, Triton | 3.00 (2.90 - 3.20) | 1.00 | 2.00 | 1.00 | 2.00 | 1.50 | 650 | 0.930 | 256 |
| GPT-2 small | float32 | another.Muon (state in bf16) | failed: TypeError: a\\|b | - | - | - | - | - | - | - | - |
| GPT-2 small | 700 | 3000 | sm 1980 MHz | - | 1.50, 2.00 | - |
| GPT-2 small | triton | empty | 12.0 | 4.00 |
| GPT-2 small | triton | filled | failed: no end after 240 s | - |
| faster | schatten.Muon | GPT-2 small | 4.50 | >= 4 | yes |"""
SPEEDS = "110000 (100000 - 120000) | 510 (500 - 520) | 5.00 (4.00 - 6.00) | 1.00 (0.800 - 1.20) %"
TRAINED_LINES = f"| 124.00M | bf16, compiled | schatten.Muon | {SPEEDS} | 3.210 after 1000 | 1024 | - | triton |"

COMPILED_LINES = """\
| 9.0 | the first candidate of each | 9 | 5.50 |
| 9.0 | all candidates, for a search | 20 | 12.5 |
| 9.0 | product | 2 | 90 - 168 | 96 | 0 | HGMMA | 0.50 - 1.00 |
| 10.0 | product | 1 | 168 | 96 | 0 | HGMMA | 1.00 |"""
RUNS = [
    ("compile_kernels.json", COMPILED, COMPILED_LINES),
    ("gpu.json", GPU_RUN, GPU_LINES),
    ("train_gpt2.json", TRAINED, TRAINED_LINES),
]


@pytest.mark.parametrize(("file", "run", "lines"), RUNS)
def test_a_run_takes_the_place_of_what_is_said_of_none(tmp_path, file, run, lines):
    (tmp_path / file).write_text(json.dumps(run))
    text = tables(tmp_path)
    assert all(f"{line} {OWN[file]}" in text for line in lines.splitlines())
    assert text.count(OWN[file]) == len(lines.splitlines())
    assert f"`benchmarks/results/{file}`" not in text


@pytest.mark.parametrize(("file", "run"), [run[:2] for run in RUNS])
def test_what_a_run_lacks_or_has_as_null_becomes_dashes(tmp_path, file, run):
    for path in sorted(paths(run)):
        for change in (lambda inside, key: inside.pop(key), lambda inside, key: inside.update({key: None})):
            less = json.loads(json.dumps(run))
            inside = less
            for key in path[:-1]:
                inside = inside[key]
            change(inside, path[-1])
            (tmp_path / file).write_text(json.dumps(less))
            for table in TABLES:
                if file in table.files:
                    assert widths(section(table, tmp_path)) <= {len(table.columns)}, path


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
    assert [number(x) for x in (0.0, 0.1234, 1.234, 12.34, 1234.5)] == ["0.000", "0.123", "1.23", "12.3", "1234"]


def test_a_page_without_marks_is_refused():
    for text in ("# Speed\n", f"{END}{BEGIN}", BEGIN):
        with pytest.raises(ValueError, match="needs the lines <!-- tables --> and <!-- /tables -->"):
            page(RESULTS, text)


def test_no_path_of_a_machine_is_on_the_page():
    text = PAGE.read_text()
    for place in (str(Path.home()), str(RESULTS.parents[1].resolve())):
        assert place == "/" or place not in text
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|data|opt)/", text)
