"""The published experiments: found by the folder's listing, right against a literal loop, run by the command line."""

import itertools
import json
import math
import pkgutil
import statistics
import sys

import pytest
import torch
from rich.console import Console

from schatten import cli
from schatten.lab import experiments
from schatten.lab.experiments import fanions

METHODS = {method.name: method for method in fanions.methods("float64")}
QUIET = Console(quiet=True)
SIZE, TARGET = 12, 0.01


def three_quintics(S):
    X = S / S.norm()
    for _ in range(3):
        Y = X @ X.T
        X = 3.4445 * X - 4.7750 * Y @ X + 2.0315 * Y @ Y @ X
    return X


# The directions as the paper writes them.
DIRECTIONS = {
    "Muon": three_quintics,
    "NSGD": lambda S: S / S.norm(),
    "F-Muon": lambda S: three_quintics(S) / 2 + S / S.norm() / 2,
    "SignSGD": torch.sign,
    "S-Muon": lambda S: three_quintics(S) / 2 + 0.01 * S.sign() / 2,
}


def literal_losses(name, problem, steps):
    lr, momentum = METHODS[name].lr, METHODS[name].momentum
    X, M, found = problem.start, torch.zeros_like(problem.start), []
    for _ in range(steps):
        found.append(0.5 * torch.trace(X.T @ problem.A @ X @ problem.B).item())
        G = problem.A @ X @ problem.B
        M = momentum * M + G
        X = X - lr * DIRECTIONS[name](G + momentum * M)
    return found


def in_fp64(problem):
    return fanions.Problem(problem.A.double(), problem.B.double(), problem.start.double())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab") / "new" / "folder"
    return out, fanions.run(2, out, QUIET, size=SIZE, target=TARGET)


def test_the_problem_is_symmetric_with_spectra_in_the_unit_interval():
    problem = fanions.Problem.draw(60, 0)
    for matrix in (problem.A, problem.B):
        torch.testing.assert_close(matrix, matrix.T)
        spectrum = torch.linalg.eigvalsh(matrix.double())
        # fp32 rounding of a matrix of norm 1; of 60 uniform draws the extremes are within 0.1 except once in 500.
        assert -1e-6 < spectrum[0] < 0.1 and 0.9 < spectrum[-1] < 1 + 1e-6
    # 3600 entries: five standard errors of the deviation, 5 * 0.1 / sqrt(7200).
    assert problem.start.std().item() == pytest.approx(0.1, abs=0.006)
    assert not torch.equal(problem.start, fanions.Problem.draw(60, 1).start)


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_the_literal_loop(name):
    problem = in_fp64(fanions.Problem.draw(SIZE, 0))
    found = list(itertools.islice(fanions.losses(METHODS[name], problem), 40))
    # Both in fp64; 40 iterations of bounded steps amplify its rounding by far less than 1e6.
    assert found == pytest.approx(literal_losses(name, problem, 40), rel=1e-9)


def test_every_row_is_the_literal_score(finished):
    _, rows = finished
    assert [row["method"] for row in rows] == list(DIRECTIONS)
    for row in rows:
        for seed, taken in enumerate(row["iterations"]):
            problem = in_fp64(fanions.Problem.draw(SIZE, seed))
            literal = literal_losses(row["method"], problem, 2 * row["published"])
            expected = next(i for i, loss in enumerate(literal) if loss <= TARGET)
            assert expected >= 20
            # Rounded to bf16, a direction is off by about a per cent, and so may be the way to the target.
            assert taken == pytest.approx(expected, rel=0.02, abs=2)
        assert row["mean"] == statistics.fmean(row["iterations"])
        assert row["standard deviation"] == statistics.stdev(row["iterations"])
        assert row["ratio"] == row["mean"] / METHODS[row["method"]].published


def test_the_file_holds_the_rows_and_what_they_ran_on(finished):
    out, rows = finished
    saved = json.loads((out / "fanions.json").read_text())
    assert saved["rows"] == [{**row, "iterations": list(row["iterations"])} for row in rows]
    assert saved["experiment"] == "fanions" and saved["torch"] == torch.__version__ and saved["size"] == SIZE


def test_a_run_that_never_arrives_is_infinite():
    method = METHODS["S-Muon"]
    assert fanions.iterations(method, fanions.Problem.draw(2, 0), target=-1.0) == math.inf


def test_a_row_says_how_many_seeds_arrived_and_averages_those():
    some = fanions.row(METHODS["S-Muon"], (445, math.inf, 1335))
    assert (some["mean"], some["ratio"], some["arrived"]) == (890, 1.0, 2)
    assert some["standard deviation"] == pytest.approx(445 * 2**0.5)
    none = fanions.row(METHODS["Muon"], (math.inf,))
    assert none["mean"] == none["ratio"] == math.inf and math.isnan(none["standard deviation"])
    cells = {column.header: list(column.cells) for column in fanions.table([some, none]).columns}
    assert cells["measured"] == ["890", "inf"] and cells["ratio"] == ["1.00", "inf"]
    assert cells["spread"] == ["629", "-"] and cells["arrived"] == ["2 of 3", "0 of 1"]


# -- the folder and the command line -----------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(fanions.run, "__kwdefaults__", {"size": SIZE, "target": TARGET})
    monkeypatch.setattr(sys, "argv", ["schatten", "lab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


def test_every_file_of_the_folder_is_listed_with_its_question(monkeypatch, capsys):
    files = {module.name.replace("_", "-") for module in pkgutil.iter_modules(experiments.__path__)}
    code, printed = command(monkeypatch, capsys, "list")
    lines = {line.split()[0]: line for line in printed.out.splitlines()}
    assert code == 0 and set(lines) == files and "fanions" in files
    for name, experiment in experiments.known().items():
        assert experiment.question in lines[name] and experiment.source in lines[name]


def test_a_run_shows_the_table_and_says_where_the_rows_are(tmp_path, monkeypatch, capsys):
    code, printed = command(monkeypatch, capsys, "run", "fanions", "--seeds=1", f"--out={tmp_path}")
    assert code == 0
    rows = json.loads((tmp_path / "fanions.json").read_text())["rows"]
    assert str(tmp_path / "fanions.json") in printed.out.replace("\n", "")
    for row in rows:
        line = next(line for line in printed.out.splitlines() if f" {row['method']} " in line)
        assert f" {row['published']} " in line and f" {row['mean']:.0f} " in line and f" {row['ratio']:.2f} " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fanion"], "no 'fanion': known are"),
        (["fanions", "--seeds=0"], "--seeds must be at least 1, got 0"),
        (["fanions", "--seeds=some"], "seeds"),
        (["fanions", "--out={file}"], "is a file or in one"),
        (["fanions", "--out={file}/deeper"], "is a file or in one"),
    ],
)
def test_wrong_input_ends_with_exit_code_two(tmp_path, monkeypatch, capsys, arguments, message):
    file = tmp_path / "file"
    file.write_text("mine")
    code, printed = command(monkeypatch, capsys, "run", *(a.format(file=file) for a in arguments))
    assert code == 2
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert file.read_text() == "mine"
