"""The preconditioning experiment: its problems against literal loops, its verdicts against doctored rows, a small run."""

import math

import pytest
import torch

from schatten.lab import experiments
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.experiments import preconditioning
from schatten.lab.experiments.preconditioning.descent import descend
from schatten.lab.experiments.preconditioning.problems import Attention, Factorisation
from schatten.lab.experiments.preconditioning.verdicts import check, reach
from schatten.lab.ledger import Ledger


def msign(G):
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ torch.diag((s > 1e-12 * s[0]).double()) @ Vh


def literal_factorisation(problem, lr, q, steps):
    M, X, errors = problem.target[0], problem.start[0], []
    for t in range(steps):
        errors.append(float((X @ X.T - M).norm() / M.norm()))
        X = X - lr * q**t * msign((X @ X.T - M) @ X)
    return errors


def literal_attention(kappa, method, steps):
    s = torch.tensor([kappa ** (-i / 29) for i in range(30)], dtype=torch.float64)
    L = torch.diag(s)
    A = 61 / 60 * L @ L + s.sum() / 60 * L
    optimum, W, errors = L @ torch.linalg.inv(A), torch.zeros(30, 30, dtype=torch.float64), []
    f0 = torch.trace(L @ optimum @ A @ optimum.T)
    for t in range(steps):
        D = W - optimum
        errors.append(float(torch.trace(L @ D @ A @ D.T) / f0))
        G = L @ D @ A
        W = W - (0.5 * optimum.max() * 0.98**t * msign(G) if method == "Muon" else G / A.max())
    return errors


def test_the_factorisation_is_the_literal_loop():
    problem = Factorisation.draw(10, [3])
    found = descend(problem, "Muon", 0.3, 0.98, 40)
    literal = literal_factorisation(problem, 0.3, 0.98, 41)
    # fp64; Muon's sign amplifies rounding by at most a factor of ten in each sign change of these forty steps.
    assert [e for _, e in found["curve"]] == pytest.approx([literal[i] for i, _ in found["curve"]], rel=1e-6)


@pytest.mark.parametrize(("method", "lr", "q"), [("Muon", 0.5, 0.98), ("GD", 1.0, 1.0)])
def test_the_attention_problem_is_the_literal_loop(method, lr, q):
    found = descend(Attention.build(10), method, lr, q, 60)
    literal = literal_attention(10, method, 61)
    assert [e for _, e in found["curve"]] == pytest.approx([literal[i] for i, _ in found["curve"]], rel=1e-6)


def test_the_published_counts_of_attention_come_out_to_the_step():
    assert descend(Attention.build(1), "Muon", 0.5, 0.98, 10)["steps"] == [4]
    assert descend(Attention.build(1), "GD", 1.0, 1.0, 10)["steps"] == [1]
    assert descend(Attention.build(10), "Muon", 0.5, 0.98, 400)["steps"] == [323]


def test_muon_does_not_notice_the_rotation_and_adam_does():
    plain, rotated = Attention.build(100), Attention.build(100, [5])
    muon = [descend(problem, "Muon", 0.5, 0.9, 200)["steps"] for problem in (plain, rotated)]
    # Rounding may move the last step by which the target is crossed.
    assert abs(muon[0][0] - muon[1][0]) <= 10
    # Adam takes 109 steps without the rotation.
    adam = [descend(problem, "Adam", 0.1, 0.98, 250)["steps"][0] for problem in (plain, rotated)]
    assert adam[0] < 200 and adam[1] == math.inf


def test_a_run_that_never_arrives_is_infinite_and_one_that_diverges_ends():
    spent = descend(Factorisation.draw(10, [0]), "Muon", 0.3, 0.5, 10_000)
    assert spent["steps"] == [math.inf] and spent["curve"][-1][0] < 100
    wild = descend(Factorisation.draw(10, [0]), "GD", 50.0, 1.0, 10_000)
    assert wild["steps"] == [math.inf] and wild["curve"][-1][0] < 1000


def test_the_reach_of_one_more_draw():
    # Student's t of 4 degrees of freedom, 2.776, times sqrt(1 + 1/5) and the deviation of 1 ... 5.
    assert reach([1, 2, 3, 4, 5]) == pytest.approx(2.776 * math.sqrt(1.2) * math.sqrt(2.5), rel=1e-3)


def row(phase="published", problem="factorisation", method="Muon", kappa=10, lr=0.3, q=0.98, cap=20_000, steps=(630, 633, 637)):
    case = {"phase": phase, "problem": problem, "method": method, "kappa": kappa, "lr": lr, "q": q, "cap": cap}
    return {**case, "steps": list(steps), "lowest": [0.37] * len(steps), "curve": [[0, 1.0], [600, 1e-6]]}


def verdicts(*rows):
    return {v.quantity: v.verdict for v in check(rows)}


def test_a_count_that_is_off_is_not_reproduced():
    name = "factorisation, kappa 10: steps of Muon"
    assert verdicts(row())[name] == REPRODUCED
    assert verdicts(row(steps=(730, 733, 737)))[name] == NOT_REPRODUCED
    assert verdicts(row(steps=(630,)))[name] == OUT_OF_REACH
    exact = "attention, kappa 10: steps of Muon"
    assert verdicts(row(problem="attention", steps=(323,)))[exact] == REPRODUCED
    assert verdicts(row(problem="attention", steps=(324,)))[exact] == NOT_REPRODUCED


def test_never_arriving_needs_the_published_cap():
    name = "factorisation, kappa 1000: steps of GD"
    never = {"method": "GD", "kappa": 1000, "q": 1.0, "steps": (math.inf, math.inf)}
    assert verdicts(row(**never))[name] == REPRODUCED
    assert verdicts(row(**never, cap=500))[name] == OUT_OF_REACH
    assert verdicts(row(**{**never, "steps": (math.inf, 300)}, cap=500))[name] == NOT_REPRODUCED


def test_counts_that_grow_with_kappa_are_not_free_of_it():
    name = "factorisation: steps grow as kappa to the power, Muon"
    assert verdicts(*(row(kappa=k) for k in (10, 100, 1000)))[name] == REPRODUCED
    grown = [row(kappa=k, steps=(s, s + 1, s + 2)) for k, s in ((10, 600), (100, 900), (1000, 1300))]
    assert verdicts(*grown)[name] == NOT_REPRODUCED


def test_a_constant_lr_that_arrives_does_not_stall():
    name = "factorisation: constant lr 0.3 stalls at a residual of"
    stalled = row(phase="constant", q=1.0, steps=(math.inf, math.inf))
    assert verdicts(stalled)[name] == REPRODUCED
    assert verdicts({**stalled, "steps": [math.inf, 500]})[name] == NOT_REPRODUCED
    assert verdicts({**stalled, "lowest": [0.11, 0.1]})[name] == NOT_REPRODUCED


def test_a_tuned_muon_that_is_not_faster_does_not_beat_adam():
    name = "factorisation, kappa 100: tuned Muon needs fewer steps than tuned Adam"
    adam = row(phase="tuned", method="Adam", kappa=100, lr=0.03, q=1.0, steps=(258, 260, 263))
    assert verdicts(adam, row(phase="tuned", kappa=100, lr=0.1, q=0.9, steps=(110, 112, 113)))[name] == REPRODUCED
    assert verdicts(adam, row(phase="tuned", kappa=100, lr=0.1, q=0.9, steps=(257, 261, 264)))[name] == NOT_REPRODUCED


def test_a_small_run_has_verdicts_and_a_picture_and_tunes_all_with_as_many_trials():
    ledger = Ledger(None, {})
    experiment = experiments.load("preconditioning")
    experiment.run(preconditioning.Config(seeds=2, kappas=(10, 100), cap=20, tuning_cap=8), ledger)
    assert len(experiment.check(ledger.rows)) > 10
    assert set(experiment.pictures(ledger.rows)) == set(experiment.captions)
    for problem in ("factorisation", "attention"):
        trials = [r["method"] for r in ledger.rows if r["phase"] == "tune" and r["problem"] == problem and r["kappa"] == 10]
        assert [trials.count(method) for method in ("Muon", "GD", "Adam")] == [10, 10, 10]
    assert {tuple(r["seeds"]) for r in ledger.rows if r["phase"] == "tune" and "seeds" in r} == {(1000,)}
