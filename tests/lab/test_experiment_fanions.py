"""The fanions experiment: its iterations are those of a literal loop, its verdicts follow from the rows alone."""

import itertools
import math

import pytest
import torch

from schatten.lab.experiments import fanions
from schatten.lab.ledger import Ledger

METHODS = {method.name: method for method in fanions.methods("float64")}
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


def test_every_row_is_the_literal_score():
    ledger = Ledger(None, {})
    fanions.run(fanions.Config(seeds=2, size=SIZE, target=TARGET), ledger)
    assert [(row["method"], row["seed"]) for row in ledger.rows] == list(itertools.product(DIRECTIONS, range(2)))
    for row in ledger.rows:
        problem = in_fp64(fanions.Problem.draw(SIZE, row["seed"]))
        literal = literal_losses(row["method"], problem, 2 * METHODS[row["method"]].published)
        expected = next(i for i, loss in enumerate(literal) if loss <= TARGET)
        assert expected >= 20
        # Rounded to bf16, a direction is off by about a per cent, and so may be the way to the target.
        assert row["iterations"] == pytest.approx(expected, rel=0.02, abs=2)


def test_a_run_that_never_arrives_is_infinite():
    assert fanions.iterations(METHODS["S-Muon"], fanions.Problem.draw(2, 0), target=-1.0) == math.inf


def rows_of(name, *taken):
    return [{"method": name, "seed": seed, "iterations": iterations} for seed, iterations in enumerate(taken)]


@pytest.mark.parametrize(
    ("taken", "word"), [((1000, 1100), "reproduced"), ((1300, 1310), "not reproduced"), ((1060, math.inf), "not reproduced")]
)
def test_a_number_is_reproduced_if_every_seed_arrived_within_the_tolerance(taken, word):
    (verdict,) = fanions.check(rows_of("Muon", *taken))
    assert verdict.verdict == word and verdict.published == "1060"


def test_seeds_that_never_arrived_are_counted():
    (verdict,) = fanions.check(rows_of("F-Muon", 900, math.inf))
    assert "1 diverged" in verdict.ours
