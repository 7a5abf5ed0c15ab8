"""Convex maps: the table holds every map, what is verified is what literal formulas say, and mistakes change verdicts."""

import dataclasses
import math

import pytest
import torch

from schatten import maps, solvers
from schatten.lab.contest import TUNING_SEED
from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.experiments import convex_maps
from schatten.lab.experiments.convex_maps import EXPERIMENT, Config, training
from schatten.lab.experiments.convex_maps.table import MUON, dual_ball, table
from schatten.lab.ledger import Ledger

TINY = Config(seeds=2, steps=4, batch=32, passes=1, hidden=(6, 6), layers=1, heads=2, width=8, context=8)
SVD = solvers.svd()
FEW = {MUON: maps.Nuclear(SVD), "Frobenius": maps.Frobenius(), "Power 1": maps.Power(1.0, solver=SVD)}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def rows():
    ledger = Ledger(None, {})
    EXPERIMENT.run(dataclasses.replace(TINY, seeds=1), ledger)
    return ledger.rows


def test_the_table_has_every_map_of_the_folder_muons_first():
    found = table(0.1, 8)
    assert next(iter(found)) == MUON and len(set(map(repr, found.values()))) == len(found)
    kinds = {type(K).__name__ for K in found.values()}
    assert kinds == set(maps.__all__) - {"Map", "Scaled", "Sum"}
    assert {"Schatten inf", "Power 0.25", "L1 rows", "KyFan 2"} <= set(found)
    assert all(repr(K).count("svd()") == ("solver" in {f.name for f in dataclasses.fields(K)}) for K in found.values())
    thresholds = [K.a for K in found.values() if getattr(K, "a", 0)]
    assert thresholds == [0.1] * 7


def test_without_exact_directions_a_map_has_its_own_solver(monkeypatch):
    # Of one map: towers of the others take seconds to fit.
    monkeypatch.setattr(maps, "__all__", [MUON])
    assert table(0.1, 8, exact=False) == {MUON: maps.Nuclear()}


def test_a_run_has_a_row_for_every_case_and_makes_verdicts_and_pictures(rows):
    phases = [row["phase"] for row in rows]
    count = len(table(1.0, 6))
    assert [phases.count(phase) for phase in ("pilot", "match", "final")] == [1, count - 1, count]
    assert all(row["seed"] == TUNING_SEED for row in rows if row["phase"] != "final")
    assert len(EXPERIMENT.check(rows)) == count + 1
    assert set(EXPERIMENT.pictures(rows)) == {"losses", "spectra"} == set(EXPERIMENT.captions)
    for own in (rows[:2], rows[-1:], []):
        assert isinstance(EXPERIMENT.check(own), list)
        EXPERIMENT.pictures(own)


def test_rows_hold_what_the_weights_say(rows):
    finals = {row["map"]: row for row in rows if row["phase"] == "final"}
    for name, row in finals.items():
        assert len(row["ball"]) == len(row["residual"]) == 2 and row["others"].keys() == finals.keys()
        assert row["others"][name] == row["residual"][1] and all(0 <= v <= 1 for v in row["others"].values())
        assert row["problem"].startswith("min F") and len(row["sigma"]) <= training.SHOWN
    # A contraction of 1 - lr lambda a step, from wherever the start was.
    assert all(row["ball"][1] <= row["allowed"] + 1e-5 for row in finals.values())
    # The pilot's updates are its own on the tuning seed, the final's on another.
    assert finals[MUON]["rms"] == pytest.approx(rows[0]["rms"], rel=0.2)


# -- the mathematics -----------------------------------------------------------------------------------------------------

GAUGES = {
    "Nuclear": lambda Y, s: s.max(),
    "Frobenius": lambda Y, s: Y.norm(),
    "Schatten inf": lambda Y, s: s.sum(),
    "Schatten 4": lambda Y, s: (s ** (4 / 3)).sum() ** (3 / 4),
    "KyFan 2": lambda Y, s: max(s.max(), s.sum() / 2),
    "Clip": lambda Y, s: s.max() / 0.1,
    "Huber": lambda Y, s: s.max(),
    "LogSmoothed": lambda Y, s: s.max(),
    "L1 entries": lambda Y, s: Y.abs().max(),
    "L1 rows": lambda Y, s: Y.norm(dim=1).max(),
    "Power 0.5": lambda Y, s: 0.0,
    "SoftThreshold": lambda Y, s: 0.0,
}


@pytest.mark.parametrize("name", GAUGES)
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_dual_ball_value_is_the_norm_of_the_table_inside_and_outside(name, size):
    Y = size * gaussian(8, 9)
    expected = float(GAUGES[name](Y, torch.linalg.svdvals(Y)))
    # The difference of two violations a million times as large, in fp64.
    assert float(dual_ball(table(0.1, 8)[name], Y)) == pytest.approx(expected, rel=1e-8, abs=0)


def test_the_residual_of_muons_problem_is_the_papers_score_over_its_terms():
    W, G, decay, c = 0.05 * gaussian(1, 5, 7), gaussian(1, 5, 7, seed=1), 0.8, 1.3
    nuclear, inner = c * torch.linalg.svdvals(G).sum(), decay * (W * G).sum()
    expected = (nuclear + inner) / (nuclear + inner.abs())
    assert training.residual(maps.Nuclear(SVD), c, decay, [(W, G)]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", table(0.1, 5))
def test_the_residual_vanishes_where_the_weights_solve_the_problem_and_with_a_wrong_factor_does_not(name):
    K, decay, c, G = table(0.1, 5)[name], 0.8, 1.3, gaussian(1, 5, 7, seed=2)
    W = -c * K.grad(G) / decay
    # Terms of order one to ten that cancel, in fp64.
    assert training.residual(K, c, decay, [(W, G)]) < 1e-9
    assert training.residual(K, 2 * c, decay, [(W, G)]) > 0.05
    # The worst of the matrices counts; half the factor puts norms' weights outside.
    assert training.residual(K, c / 2, decay, [(W, G), (0 * W, G)]) > 0.05


def test_lengths_are_of_updates_without_the_decay():
    W, lr, decay = torch.nn.Parameter(gaussian(4, 6)), 0.1, 0.7
    group = {"algorithm": "spectral", "params": [W], "lr": lr}
    optimizer = type("Groups", (), {"param_groups": [group]})()
    lengths, squares = training.Lengths(decay), []
    for step in range(4):
        lengths(step, torch.nn.Identity(), optimizer)
        U = gaussian(4, 6, seed=10 + step)
        if step < 3:
            squares.append(U.square())
            W.data = (1 - lr * decay) * W.data - lr * U
    assert lengths.rms == pytest.approx(math.sqrt(torch.stack(squares).mean()), rel=1e-10)


@pytest.mark.parametrize("slope", [1.0, 0.7])
def test_the_factor_is_found_by_a_secant_in_logarithms(slope):
    tried, target = [], 0.3

    def length(c):
        return 0.05 * c**slope

    for _ in range(3):
        c = training.next_factor(2.0, tried, target)
        tried.append((c, length(c)))
    assert tried[0][0] == 2.0 and tried[-1][1] == pytest.approx(target, rel=1e-9)


def test_a_factor_that_makes_updates_as_long_is_kept():
    assert not training.matched([], 0.3) and not training.matched([(1.0, 0.3), (2.0, 0.4)], 0.3)
    assert training.matched([(1.0, 0.3 * 1.049)], 0.3) and not training.matched([(1.0, 0.3 * 0.94)], 0.3)
    assert not training.matched([(1.0, math.nan)], 0.3)


def test_a_factor_whose_training_diverged_is_made_smaller():
    assert training.next_factor(2.0, [(2.0, math.nan)], 0.3) == 0.5
    assert training.next_factor(2.0, [(2.0, math.nan), (0.5, 0.6)], 0.3) == pytest.approx(0.25)


def test_the_rule_is_c_times_the_map_on_hidden_matrices_and_adamw_for_the_rest():
    model = training.task(TINY).model()
    optimizer = training.build(TINY, maps.L1(), 0.25, model)
    routes = [(g["algorithm"], len(g["params"])) for g in optimizer.param_groups]
    assert routes == [("spectral", 2), ("adamw", 1)]
    assert optimizer.rule(optimizer.param_groups[0]).map == 0.25 * maps.L1()
    W = training.matrices(optimizer)[0]
    before = W.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(W.detach(), (1 - TINY.lr * TINY.decay) * before - TINY.lr * 0.25)


def test_a_gpt_is_compared_with_each_maps_own_solver(monkeypatch):
    def few(threshold, rank, *, exact):
        assert not exact
        return FEW

    monkeypatch.setattr(convex_maps, "table", few)
    monkeypatch.setattr(training, "table", few)
    ledger = Ledger(None, {})
    config = dataclasses.replace(TINY, seeds=1, network="gpt", exact=False, batch=2, measured=2, decay=0.5)
    EXPERIMENT.run(config, ledger)
    finals = [row for row in ledger.rows if row["phase"] == "final"]
    assert [row["map"] for row in finals] == list(FEW)
    # Six matrices of one block.
    assert all(row["exact"] is False and math.isfinite(row["loss"]) and len(row["sigma"]) == 48 for row in finals)


# -- verdicts ------------------------------------------------------------------------------------------------------------


def good():
    """Rows as the table says: Muon's ball, a ball of the Frobenius norm, a penalty; losses that differ for sure."""
    found = [{"phase": "pilot", "seed": 1000, "threshold": 0.1, "rank": 4, "rms": 0.2, "factors": {}}]
    for i, (name, K) in enumerate(FEW.items()):
        for seed in range(3):
            bounded = name != "Power 1"
            found.append(
                {
                    "phase": "final",
                    "map": name,
                    "factor": 1.0,
                    "seed": seed,
                    "loss": 1 + 0.1 * i + 0.01 * seed + 1e-4 * i * seed,
                }
                | {"rms": 0.2, "problem": K.describe(1.0), "ball": [2.0, 0.99] if bounded else [0.0, 0.0]}
                | {
                    "allowed": 1.001 if bounded else 1.0,
                    "residual": [1.0, 0.05],
                    "score": [2.0, 0.1],
                    "exact": True,
                    "steps": 100,
                }
                | {"others": {n: 0.05 if n == name else 0.5 for n in FEW}, "sigma": [0.1, 0.9], "radius": 1.0}
            )
    return found


def test_rows_as_the_table_says_are_reproduced_and_the_losses_have_nothing_to_compare_with():
    found = EXPERIMENT.check(good())
    assert [verdict.verdict for verdict in found] == [REPRODUCED] * 3 + [OUT_OF_REACH]
    assert "higher: Frobenius, Power 1" in found[-1].why and "lower: none" in found[-1].why
    assert "at most 0 of 3 problems fit better" in found[0].why
    assert "but for" not in found[-1].why and "score to 0.05 +- 0" in found[0].ours


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (MUON, {"ball": [2.0, 1.01]}),
        ("Frobenius", {"ball": [2.0, 1.01]}),
        ("Frobenius", {"residual": [1.0, 0.4]}),
        ("Power 1", {"residual": [1.0, 0.4]}),
        ("Power 1", {"residual": [1.0], "score": [2.0], "others": {}, "loss": math.inf}),
    ],
)
def test_a_mistake_in_one_seed_changes_the_verdict_of_its_map_alone(name, change):
    rows = [{**row, **change} if (row.get("map"), row["seed"]) == (name, 1) else row for row in good()]
    found = {v.quantity.split(":")[0]: v.verdict for v in EXPERIMENT.check(rows) if "induced" in v.quantity}
    assert found == {n: NOT_REPRODUCED if n == name else REPRODUCED for n in FEW}


def test_updates_that_are_not_as_long_as_muons_are_named():
    rows = [{**row, "rms": 0.3} if row.get("map") == "Frobenius" else row for row in good()]
    assert "but for Frobenius 1.50" in EXPERIMENT.check(rows)[-1].why


def test_losses_of_one_seed_claim_nothing():
    why = EXPERIMENT.check([row for row in good() if row["seed"] in (0, 1000)])[-1].why
    assert "lower: none; higher: none" in why


@pytest.mark.parametrize(
    ("given", "message"),
    [({"network": "vit"}, "--network has no 'vit'"), ({"data": "/not/there"}, "--data /not/there")],
)
def test_wrong_settings_are_refused_by_name(given, message):
    with pytest.raises(InputError, match=message):
        EXPERIMENT.run(dataclasses.replace(TINY, **given), Ledger(None, {}))


def test_the_full_size_decays_by_less_than_all_in_a_step():
    for config in (EXPERIMENT.quick, EXPERIMENT.full):
        assert 0 < config.lr * config.decay < 0.1
