"""The critical-batch experiment: fits of known curves, verdicts on known rows, a run of seconds."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, REPRODUCED
from schatten.lab.experiments import load
from schatten.lab.experiments.critical_batch import crossing
from schatten.lab.experiments.critical_batch.curves import curve, fitted, lack_of_fit, logs_of_b0
from schatten.lab.experiments.critical_batch.variants import ADAMW, MUON, NEITHER, NO_DECAY, NO_NESTEROV
from schatten.lab.fit import Fit
from schatten.lab.ledger import Ledger

EXPERIMENT = load("critical-batch")
BATCHES = (8, 16, 32, 64, 128, 256)


def bound(b, X=0.4, Y=0.3, rest=0.05):
    """T of X/T + Y/b + Z = eps^2, solved for T, with rest = eps^2 - Z."""
    return X / (rest - Y / b) if rest > Y / b else math.inf


def hyperbola(b, a=10.0, c=50.0):
    return a * (1 + c / b)


def rows_of(T, phase, name=MUON, noise=0.02, seeds=4):
    """Rows whose seeds differ by factors exp(+-noise), and the more so the smaller the batch, so that ratios differ too."""
    signs = np.random.default_rng(0).standard_normal((seeds, len(BATCHES)))
    return [
        {
            "phase": phase,
            "optimizer": name,
            "batch": b,
            "lr": 0.02,
            "seed": s,
            "limit": 400,
            "steps": T(b) * math.exp(noise * signs[s, i]),
        }
        for s in range(seeds)
        for i, b in enumerate(BATCHES)
    ]


def of(rows, text):
    found = [v for v in EXPERIMENT.check(rows) if text in v.quantity]
    assert len(found) == 1, [v.quantity for v in EXPERIMENT.check(rows)]
    return found[0]


def test_the_fits_recover_both_forms_constants():
    batches = np.array(BATCHES, float)
    found = fitted("bound", batches, np.array([bound(b) for b in BATCHES]))
    # Y / rest = 6; the search's grid is 1 % of the smallest batch wide there.
    assert found.b0 == pytest.approx(6, rel=0.01) and found.level == pytest.approx(0.4 / 0.05, rel=0.01)
    found = fitted("hyperbola", batches, np.array([hyperbola(b) for b in BATCHES]))
    assert found.b0 == pytest.approx(50, rel=0.01) and found.level == pytest.approx(10, rel=0.01)
    assert found(batches) == pytest.approx([hyperbola(b) for b in BATCHES], rel=0.01)


def test_the_search_is_as_good_as_a_solver_over_both_constants():
    from scipy.optimize import least_squares

    batches = np.array(BATCHES, float)
    steps = np.array([r["steps"] for r in rows_of(hyperbola, "tuned", noise=0.2, seeds=1)])
    solved = least_squares(lambda x: x[0] + np.log1p(np.exp(x[1]) / batches) - np.log(steps), [1.0, 1.0])
    found = fitted("hyperbola", batches, steps)
    # A grid of 2000 points over ten decades of b0: steps of 1 %, to which the residual is quadratic.
    assert math.log(found.b0) == pytest.approx(solved.x[1], abs=0.01)
    assert found.rms == pytest.approx(math.sqrt(np.square(solved.fun).mean()), rel=1e-3)


def test_gradients_of_the_bound_are_fewest_at_twice_its_smallest_batch():
    batches = np.linspace(6.5, 40, 20000)
    N = [b * bound(b) for b in batches]
    assert batches[int(np.argmin(N))] == pytest.approx(12, rel=1e-3)


def test_the_target_is_crossed_along_the_logarithm_of_the_loss():
    found = Fit(curve=[(1, 2.0), (2, 1.0), (3, 0.25), (4, 0.1)])
    assert crossing(found, 0.5) == pytest.approx(2.5)
    assert crossing(found, 0.25) == 3 and crossing(found, 3.0) == 1 and crossing(found, 0.01) == math.inf


def test_curves_of_the_bounds_form_are_recognised_and_others_are_not():
    right, wrong = rows_of(bound, "fixed"), rows_of(hyperbola, "fixed")
    assert of(right, "bound's form").verdict == REPRODUCED
    assert of(wrong, "bound's form").verdict == NOT_REPRODUCED
    assert lack_of_fit("hyperbola", curve(wrong, "fixed", MUON)) > 0.01 > lack_of_fit("bound", curve(wrong, "fixed", MUON))
    assert of(right, "has a minimum").verdict == REPRODUCED
    # N = a (b + c) only bends.
    assert of(wrong, "has a minimum").verdict == NOT_REPRODUCED


def test_runs_that_did_not_arrive_count_as_what_they_had_spent():
    rows = [{**r, "steps": math.inf} if r["batch"] == 8 else r for r in rows_of(bound, "fixed")]
    assert "4 of 4 not arrived" in of(rows, "has a minimum").ours and of(rows, "has a minimum").verdict == REPRODUCED
    cheap = [{**r, "limit": 2} for r in rows]
    assert of(cheap, "has a minimum").verdict == NOT_REPRODUCED
    assert curve(rows, "fixed", MUON).arrived.batches.tolist() == [16, 32, 64, 128, 256]


def test_a_critical_batch_outside_the_measured_ones_is_not_claimed():
    assert of(rows_of(hyperbola, "tuned"), "a critical batch exists").verdict == REPRODUCED
    beyond = rows_of(lambda b: hyperbola(b, c=5000.0), "tuned")
    assert of(beyond, "a critical batch exists").verdict == NOT_REPRODUCED


def test_the_slack_of_the_bound_is_the_default_polynomials():
    from schatten.lab.experiments.critical_batch.comparison import SLACK
    from schatten.solvers.composed import DEFAULT_TOL

    assert SLACK == 1 + DEFAULT_TOL


def test_decay_and_nesterov_are_judged_by_all_four_variants():
    def rows(decayed):
        four = {MUON: decayed, NO_DECAY: 50.0, NO_NESTEROV: decayed, NEITHER: 50.0}
        found = []
        for i, (name, c) in enumerate(four.items()):
            # Seeds differ from variant to variant, as equal ones would make every difference exact.
            found += rows_of(lambda b, c=c: hyperbola(b, c=c), "tuned", name, noise=0.02 * (1 + i / 4))
        return found

    assert of(rows(100.0), "decay moves").verdict == REPRODUCED
    # 100 over 50, to the noise of four seeds.
    assert "ratio of c 1.99" in of(rows(100.0), "decay moves").ours
    assert of(rows(50.0), "decay moves").verdict == NOT_REPRODUCED
    assert of(rows(100.0), "Nesterov moves").verdict == NOT_REPRODUCED


def test_a_smaller_critical_batch_than_adamws_is_not_a_larger_one():
    def rows(c):
        muon = rows_of(lambda b: hyperbola(b, c=c), "tuned", MUON)
        return muon + rows_of(hyperbola, "tuned", ADAMW, noise=0.03)

    assert of(rows(100.0), "over AdamW's").verdict == REPRODUCED
    assert of(rows(25.0), "over AdamW's").verdict == NOT_REPRODUCED


def test_a_broken_bound_of_the_weights_is_reported():
    rows = [
        {"phase": "bound", "product": p, "seed": s, "largest": 1.0, "settled": 0.9, "growth": 1.5 + 0.1 * s}
        for p in (0.0, 0.5, 1.0)
        for s in range(3)
    ]
    assert of(rows, "lr <= 1/lambda").verdict == REPRODUCED and of(rows, "grows on").verdict == REPRODUCED
    assert of([{**r, "settled": 1.2} for r in rows], "lr <= 1/lambda").verdict == NOT_REPRODUCED
    assert of([{**r, "largest": 1.2} for r in rows], "lr <= 1/lambda").verdict == NOT_REPRODUCED
    assert of([{**r, "growth": 0.9 + 0.1 * r["seed"]} for r in rows], "grows on").verdict == NOT_REPRODUCED


def test_a_small_run_measures_judges_and_draws():
    small = replace(
        EXPERIMENT.quick,
        seeds=1,
        hidden=(8,),
        target=2.25,
        evaluated=64,
        batches=(32, 64, 128, 256),
        lr=(0.02, 0.08),
        steps=8,
        samples=1,
        bound_lr=0.02,
        bound_steps=6,
        products=(0.0, 1.0, 2.1),
    )
    ledger = Ledger(None, asdict(small))
    EXPERIMENT.run(small, ledger)
    verdicts = EXPERIMENT.check(ledger.rows)
    assert any("a critical batch exists" in v.quantity for v in verdicts)
    assert any("lr <= 1/lambda" in v.quantity for v in verdicts)
    assert set(EXPERIMENT.pictures(ledger.rows)) == set(EXPERIMENT.captions)
    tried = [r for r in ledger.rows if r["phase"] == "tune"]
    # As many trials for each: every lr of the grid is tried on the first tuning seed at least.
    for optimizer in {r["optimizer"] for r in tried}:
        for b in small.batches:
            lrs = [r["lr"] for r in tried if (r["optimizer"], r["batch"], r["seed"]) == (optimizer, b, tried[0]["seed"])]
            assert sorted(lrs) == [0.02, 0.08]
    muon = curve(ledger.rows, "tuned", MUON)
    assert muon is not None and len(logs_of_b0("hyperbola", muon.arrived)) == 1


def test_a_reference_batch_that_is_not_measured_is_refused():
    config = replace(EXPERIMENT.quick, reference=48)
    with pytest.raises(InputError, match="--reference must be one of --batches"):
        EXPERIMENT.run(config, Ledger(None, asdict(config)))
