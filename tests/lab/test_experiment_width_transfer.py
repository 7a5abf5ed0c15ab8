"""The width-transfer experiment: best learning rates of known sweeps, verdicts on known rows, a run of seconds."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, REPRODUCED
from schatten.lab.experiments import load
from schatten.lab.experiments.width_transfer import outputs, walk
from schatten.lab.experiments.width_transfer.contenders import CONTENDERS, FULL, RESCALED_ONLY, START_ONLY, UPDATES
from schatten.lab.experiments.width_transfer.fits import best_losses, slopes, vertex, vertices
from schatten.lab.ledger import Ledger
from schatten.lab.models import MLP

EXPERIMENT = load("width-transfer")
WIDTHS = (64, 128, 256)


def sweep(name, shift, height=0.0, widths=WIDTHS, seeds=4, jitter=0.02):
    """Rows of parabolas whose minimum moves by `shift` per doubling."""
    random = np.random.default_rng(0)
    rows = []
    for i, width in enumerate(widths):
        for seed in range(seeds):
            middle = -3.3 + shift * i + jitter * random.standard_normal()
            for k in range(-9, 2):
                loss = 0.2 + 0.1 * (k - middle) ** 2 + height + 0.001 * seed
                rows.append({"phase": "sweep", "contender": name, "width": width, "lr": 2.0**k, "seed": seed, "loss": loss})
    return rows


def of(rows, text):
    found = [v for v in EXPERIMENT.check(rows) if text in v.quantity]
    assert len(found) == 1, [v.quantity for v in EXPERIMENT.check(rows)]
    return found[0]


def test_the_vertex_of_a_parabola_is_found_and_ends_are_not_extrapolated():
    losses = {float(k): (k - 1.3) ** 2 for k in range(-2, 5)}
    assert vertex(losses) == pytest.approx(1.3)
    assert vertex({k: v for k, v in losses.items() if k >= 2}) == 2.0
    assert vertex({**losses, 2.0: math.inf}) == 1.0


def test_a_walk_goes_downhill_and_takes_all_its_trials():
    for start, bottom in ((0, 0), (0, 3), (0, -3), (5, 1)):
        seen = []

        def loss(k, bottom=bottom, seen=seen):
            seen.append(k)
            return (k - bottom - 0.2) ** 2

        assert walk(loss, start, 7) == bottom
        assert len(seen) == 7 == max(seen) - min(seen) + 1


def test_a_walk_with_its_minimum_inside_goes_on_at_the_lower_end():
    for bottom, expected in ((0.3, [-1, 0, 1, 2]), (-0.3, [-2, -1, 0, 1])):
        seen = []
        walk(lambda k, bottom=bottom, seen=seen: seen.append(k) or (k - bottom) ** 2, 0, 4)
        assert sorted(seen) == expected


def test_a_walk_leaves_diverged_runs_behind():
    assert walk(lambda k: math.inf if k > -2 else abs(k + 3), -1, 5) == -3


def test_the_drift_of_the_best_lr_is_measured_by_seed():
    drift = slopes(vertices(sweep(UPDATES, -0.5, jitter=0.0), UPDATES))
    assert drift == pytest.approx([-0.5] * 4)


def test_no_seed_chooses_its_own_lr():
    # All three together would choose 1, seeds 1 and 2 choose 2.
    losses = {0: {1: 0.0, 2: 2.0}, 1: {1: 0.9, 2: 0.4}, 2: {1: 0.8, 2: 0.3}}
    expected = []
    for s in losses:
        means = {k: np.mean([losses[o][k] for o in losses if o != s]) for k in (1, 2)}
        expected.append(losses[s][min(means, key=means.get)])
    assert best_losses(losses) == expected == [2.0, 0.9, 0.8]


def test_outputs_are_those_of_every_linear_layer():
    torch.manual_seed(0)
    model, x = MLP((4, 6, 3)), torch.randn(5, 1, 2, 2)
    first, second = model.layers[0], model.layers[2]
    hidden = first(x.flatten(1))
    torch.testing.assert_close(outputs(model, x), [hidden, second(hidden.relu())])


def test_a_wandering_best_lr_is_not_called_transfer():
    assert of(sweep(FULL, 0.0), f"width, {FULL}").verdict == REPRODUCED
    assert of(sweep(FULL, -1.0), f"width, {FULL}").verdict == NOT_REPRODUCED
    assert of(sweep("AdamW", -1.0), "width, AdamW").verdict == REPRODUCED
    assert of(sweep("AdamW", 0.0), "width, AdamW").verdict == NOT_REPRODUCED


def test_few_seeds_that_disagree_show_no_transfer():
    assert of(sweep(FULL, 0.0, seeds=2, jitter=1.0), f"width, {FULL}").verdict == NOT_REPRODUCED


def test_updates_alone_do_not_suffice_if_their_loss_is_higher():
    assert of(sweep(FULL, 0) + sweep(UPDATES, 0), "suffices").verdict == REPRODUCED
    assert of(sweep(FULL, 0) + sweep(UPDATES, 0, height=0.1, jitter=0.03), "suffices").verdict == NOT_REPRODUCED
    assert of(sweep(FULL, 0) + sweep(UPDATES, -0.7), "suffices").verdict == NOT_REPRODUCED


def test_the_ablations_signs_need_their_p_value():
    base = sweep(UPDATES, 0, jitter=0.0)
    worse = sweep(START_ONLY, 0, height=0.05, jitter=0.03) + sweep(RESCALED_ONLY, 0, jitter=0.0)
    assert of(base + worse, "spectral start alone").verdict == REPRODUCED
    assert of(base + worse, "rescaled update alone").verdict == REPRODUCED
    better = sweep(START_ONLY, 0, height=-0.05, jitter=0.03) + sweep(RESCALED_ONLY, 0, height=0.05, jitter=0.03)
    assert of(base + better, "spectral start alone").verdict == NOT_REPRODUCED
    assert of(base + better, "rescaled update alone").verdict == NOT_REPRODUCED


def small():
    return replace(EXPERIMENT.quick, seeds=2, widths=(8, 16), steps=4, batch=16, trials=3, check_steps=2, ablation=16)


def test_a_small_run_measures_judges_and_draws():
    ledger = Ledger(None, asdict(small()))
    EXPERIMENT.run(small(), ledger)
    assert of(ledger.rows, "||dW||_op / (lr sqrt(m/n)) during training, Muon++").verdict == REPRODUCED
    quantities = [v.quantity for v in EXPERIMENT.check(ledger.rows)]
    for contender in CONTENDERS:
        assert any("best log2 lr" in q and q.endswith(contender.name) for q in quantities)
    assert any("ablation" in q for q in quantities)
    assert set(EXPERIMENT.pictures(ledger.rows)) == set(EXPERIMENT.captions)
    for row in ledger.rows:
        # Muon++ starts with every matrix at sqrt(m/n), to the power iteration's precision.
        if row["phase"] == "transfer" and row["contender"] == FULL:
            assert row["weights"][0] == pytest.approx([1.0] * 3, rel=0.02)
    counts = {}
    for row in ledger.rows:
        if row["phase"] == "sweep":
            key = (row["contender"], row["width"])
            counts[key] = counts.get(key, 0) + 1
    assert set(counts.values()) == {small().trials * small().seeds}

    # An update that is too long must be seen.
    doctored = [
        {**r, "updates": [[1.1 * x for x in at] for at in r["updates"]]} if r["phase"] == "transfer" else r for r in ledger.rows
    ]
    assert of(doctored, "||dW||_op / (lr sqrt(m/n)) during training, Muon++").verdict == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("change", "text"), [({"ablation": 32}, "--ablation must be one"), ({"trials": 2}, "--trials must be")]
)
def test_settings_that_cannot_be_measured_are_refused(change, text):
    config = replace(small(), **change)
    with pytest.raises(InputError, match=text):
        EXPERIMENT.run(config, Ledger(None, asdict(config)))
