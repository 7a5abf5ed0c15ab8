"""A fair comparison: equal trials, a tuning seed apart, equal gradient evaluations, and rows from which it goes on."""

import dataclasses
import math

import pytest
import torch

from schatten.lab import contest as contests
from schatten.lab import images, optimizers
from schatten.lab.contest import TUNING_SEED, Contender, contest
from schatten.lab.fit import Fit, Loop
from schatten.lab.ledger import Ledger, raw_rows
from schatten.lab.models import MLP
from schatten.lab.tasks import Classification
from schatten.lab.tuning import Span

LOOP = Loop(steps=12, batch=8)
SPACE = {"lr": Span(1e-3, 1.0)}


def lr_of(params):
    return params["lr"]


@pytest.fixture
def fits(monkeypatch):
    """The trainings that were asked for, none of which takes place: the loss is the distance of log10 lr from -2."""
    asked = []

    def fit(task, build, loop, *, seed, closure, folder):
        lr = build(None)
        asked.append({"lr": lr, "loop": loop, "seed": seed, "closure": closure})
        return Fit(loss=abs(math.log10(lr) + 2) + seed / 1e6, steps=loop.steps, train=[(1, 3.0)], diverged=lr > 0.5)

    monkeypatch.setattr(contests, "fit", fit)
    return asked


def contender(name, **options):
    return Contender(name, lambda model, params: params["lr"], SPACE, **options)  # type: ignore[arg-type,return-value]


def run(ledger, contenders, **options):
    return contest(ledger, None, contenders, LOOP, **{"trials": 5, "seeds": 3, **options})  # type: ignore[arg-type]


def test_every_contender_has_as_many_trials_on_the_tuning_seed_and_the_best_runs_on_the_others(fits):
    ledger = Ledger(None, {})
    finals = run(ledger, [contender("a"), contender("b")])
    for name in ("a", "b"):
        tried = [row for row in ledger.rows if row["optimizer"] == name and row["phase"] == "tune"]
        assert len(tried) == 5 and {row["seed"] for row in tried} == {TUNING_SEED}
        best = min(tried, key=lambda row: row["score"])
        assert [row["seed"] for row in finals[name]] == [0, 1, 2] and TUNING_SEED > 2
        assert {row["lr"] for row in finals[name]} == {best["lr"]} and {row["phase"] for row in finals[name]} == {"final"}
        assert min(abs(math.log10(row["lr"]) + 2) for row in tried) == abs(math.log10(best["lr"]) + 2)


def test_contenders_with_one_space_try_the_same_params(fits):
    ledger = Ledger(None, {})
    run(ledger, [contender("a"), contender("b")], trials=4)
    tried = {name: [row["lr"] for row in ledger.rows if (row["optimizer"], row["phase"]) == (name, "tune")] for name in "ab"}
    assert tried["a"] == tried["b"] and len(set(tried["a"])) == 4


@pytest.mark.parametrize(("gradients", "steps"), [(1, 12), (2, 6), (5, 2), (100, 1)])
def test_steps_are_divided_by_the_gradients_a_step_takes(fits, gradients, steps):
    run(Ledger(None, {}), [contender("a", gradients=gradients, closure=True)], trials=1, seeds=1)
    assert {(asked["loop"], asked["closure"]) for asked in fits} == {(dataclasses.replace(LOOP, steps=steps), True)}


def test_the_score_decides_and_label_and_extra_are_in_the_rows(fits):
    ledger = Ledger(None, {})
    finals = run(ledger, [contender("a")], label={"task": "x"}, score=lambda f: -f.loss, extra=lambda f: {"twice": 2 * f.loss})
    tried = [row for row in ledger.rows if row["phase"] == "tune"]
    assert finals["a"][0]["lr"] == max(tried, key=lambda row: row["loss"])["lr"]
    for row in ledger.rows:
        assert row["task"] == "x" and row["score"] == -row["loss"] and row["twice"] == 2 * row["loss"]
        # The mean of the last tenth, which of a diverged run is infinite whatever its last losses were.
        assert row["train"] == (math.inf if row["lr"] > 0.5 else 3.0) and row["steps"] == 12


def test_a_score_that_is_no_number_loses(fits):
    finals = run(Ledger(None, {}), [contender("a")], trials=6, score=lambda f: math.nan if f.loss < 0.5 else f.loss)
    assert finals["a"][0]["loss"] >= 0.5


def test_an_interrupted_contest_goes_on_and_ends_alike(fits, tmp_path):
    whole = Ledger(tmp_path / "whole", {})
    run(whole, [contender("a"), contender("b")])
    expected, count = [{**row, "run": None} for row in whole.rows], len(fits)
    # Killed in the middle of a row.
    text = (tmp_path / "whole" / "rows.jsonl").read_text()
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    (half / "rows.jsonl").write_text(text[: len(text) // 2])
    # A row whose line lacks its end alone is whole.
    kept = len(raw_rows(half))
    ledger = Ledger(half, {})
    run(ledger, [contender("a"), contender("b")])
    assert [{**row, "run": None} for row in ledger.rows] == expected and len(fits) - count == count - kept


def test_a_grid_tries_each_of_its_points_once(fits):
    ledger = Ledger(None, {})
    grid = Contender("a", lambda model, params: params["lr"], {"lr": [0.001, 0.01, 0.1]})  # type: ignore[arg-type,return-value]
    finals = run(ledger, [grid], trials=3, sampler="grid")
    assert sorted(row["lr"] for row in ledger.rows if row["phase"] == "tune") == [0.001, 0.01, 0.1]
    assert finals["a"][0]["lr"] == 0.01
    with pytest.raises(ValueError, match="space has 3, trials is 2"):
        run(Ledger(None, {}), [grid], trials=2, sampler="grid")


def test_a_real_contest_trains_networks_and_a_closure_rule_takes_two_gradients():
    """At equal evaluations of the gradient: 12 steps of Muon, 6 of the rule with two of them."""
    data = images.load()
    task = Classification(data, lambda: MLP((64, 8, 10)))

    def of(name, **options):
        def build(model, params):
            return optimizers.build(name, model, lr=params["lr"], weight_decay=0.0, betas=(0.9, 0.95))

        return Contender(name, build, {"lr": Span(1e-3, 1e-1)}, **options)

    exact = "muonmvr2"
    assert optimizers.evaluates(exact) and not optimizers.evaluates("muon")
    counted = torch.zeros(1)

    class Counted(Classification):
        def loss(self, model, *batch):
            counted.add_(1)
            return super().loss(model, *batch)

    ledger = Ledger(None, {})
    counting = Counted(task.data, task.build)
    finals = contest(ledger, counting, [of("muon"), of(exact, closure=True, gradients=2)], LOOP, trials=2, seeds=2)
    assert [row["steps"] for row in finals["muon"]] == [12, 12] and [row["steps"] for row in finals[exact]] == [6, 6]
    # Four runs of each; the rule with two gradients has no old weights in its first step.
    assert float(counted) == 4 * 12 + 4 * (2 * 6 - 1)
    for row in ledger.rows:
        assert 0 < row["loss"] < 5 and row["score"] == row["loss"] and row["seconds"] > 0
    assert finals["muon"][0]["loss"] != finals["muon"][1]["loss"]
