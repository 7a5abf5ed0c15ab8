"""The variance_reduction experiment: equal evaluations, the literal estimators, exponents and verdicts from the rows."""

import dataclasses
import math

import pytest
import torch

from schatten.lab.errors import InputError
from schatten.lab.experiments import variance_reduction
from schatten.lab.experiments.variance_reduction import networks, rates, verdicts
from schatten.lab.ledger import Ledger
from schatten.solvers import svd

SMALL = variance_reduction.Config(
    seeds=2, evaluations=64, copies=2, lrs=(0.5,), trials=1, image_width=8, image_evaluations=4, width=16, layers=1, context=8,
    batch=2, steps=2,
)  # fmt: skip
BY_NAME = {estimator.name: estimator for estimator in rates.ESTIMATORS}


@pytest.fixture(scope="module")
def rows():
    ledger = Ledger(None, dataclasses.asdict(SMALL))
    variance_reduction.run(SMALL, ledger)
    return ledger.rows


def test_a_run_has_every_part_and_all_is_said_from_the_rows(rows):
    assert {row["part"] for row in rows} == {"rates", "images", "text"}
    quantities = [v.quantity for v in variance_reduction.check(rows)]
    assert len(quantities) == len(set(quantities)) == 10
    assert set(variance_reduction.pictures(rows)) == {"rates", "images"} == set(variance_reduction.EXPERIMENT.captions)
    assert variance_reduction.check([]) == [] and variance_reduction.pictures([]) == {}


def test_rules_with_two_gradients_take_half_the_steps(rows):
    steps = {row["optimizer"]: row["steps"] for row in rows if row["part"] == "images"}
    assert steps == {"Muon": 4, "MVR1": 4, "MARS-M": 4, "MVR2": 2, "STORM": 2}
    last = {row["optimizer"]: row["steps"][-1] for row in rows if row["part"] == "rates"}
    assert last == {"momentum": 64, "MVR1": 64, "MVR1, gamma 1": 64, "MVR2": 32}


def test_mars_m_runs_on_text_at_muons_own_params(rows):
    final = {row["optimizer"]: row for row in rows if row["part"] == "text" and row["phase"] == "final"}
    assert all(final["MARS-M"][key] == final["Muon"][key] for key in ("lr", "aux_lr")) and "gamma" not in final["MARS-M"]


def test_the_gradient_is_that_of_the_stated_function():
    W = torch.randn(2, rates.FAN_OUT, rates.FAN_IN, dtype=torch.float64, requires_grad=True)
    H = torch.diag(torch.linspace(0.1, 1.0, rates.FAN_IN, dtype=torch.float64))
    (((W @ H) * W).sum() / 2 + rates.CURVE * (1 - W.cos()).sum()).backward()
    torch.testing.assert_close(rates.gradient(W.detach()), W.grad)


def literal_norms(estimator, lr, steps, seed):
    """STORM and MVR1 as their papers write them, with an SVD, from the same noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    W = (rates.START * normal(1, rates.FAN_OUT, rates.FAN_IN)).double()
    M, before, stored, norms = torch.zeros_like(W), W, None, []
    for t in range(1, steps + 1):
        Delta = (normal(1, rates.FAN_IN, rates.FAN_IN) * (rates.MULTIPLICATIVE / rates.FAN_IN**0.5)).double()
        N = (rates.NOISE * normal(1, rates.FAN_OUT, rates.FAN_IN)).double()
        norms.append(float(rates.gradient(W).norm()))
        G = rates.gradient(W) + W @ Delta + N
        old = rates.gradient(before) + before @ Delta + N if estimator.exact else G if stored is None else stored
        share = t**-estimator.average  # 1 - beta
        M = (1 - share) * M + share * G + estimator.gamma * (1 - share) * (G - old)
        before, stored = W, G
        U, _, V = torch.linalg.svd(M, full_matrices=False)
        W = W - lr * t**-estimator.step * U @ V
    return norms


@pytest.mark.parametrize("name", BY_NAME)
def test_the_norms_are_those_of_the_literal_estimator(name):
    estimator, steps = BY_NAME[name], 16
    found = rates.descend(estimator, 0.3, steps, 1, seed=4, solver=svd())
    literal = literal_norms(estimator, 0.3, steps, seed=4)
    assert found["steps"] == [float(T) for T in rates.marks(steps)]
    expected = [sum(literal[int(T) // 2 : int(T)]) / (int(T) - int(T) // 2) for T in found["steps"]]
    # fp32 against fp64 over 16 steps; a polar factor amplifies rounding by the inverse of the smallest singular value.
    assert found["norms"] == pytest.approx(expected, rel=1e-3)


def test_the_slope_is_the_exponent_of_a_power_law_and_forgets_the_start():
    steps = [float(2**k) for k in range(4, 12)]
    norms = [T**-0.3 for T in steps]
    assert rates.slope(steps, norms) == pytest.approx(-0.3)
    norms[0] = 100.0
    assert rates.slope(steps, norms, share=1 / 32) == pytest.approx(-0.3)
    assert math.isnan(rates.slope([4.0], [1.0]))


def rated(name, exponent, seeds=3):
    steps = [float(2**k) for k in range(4, 10)]
    noise = [0.001 * (seed - 1) for seed in range(seeds)]
    return [
        {"part": "rates", "phase": phase, "optimizer": name, "lr": 1.0, "seed": seed, "steps": steps,
         "norms": [T ** (exponent + noise[seed]) for T in steps]}
        for phase in ("rate", "final") for seed in range(seeds)
    ]  # fmt: skip


def words(rows):
    return {v.quantity: v.verdict for v in variance_reduction.check(rows)}


def test_a_rate_is_not_reproduced_if_the_norm_falls_too_slowly():
    quantity = "exponent of the mean gradient norm, MVR2"
    assert words(rated("MVR2", -1 / 3))[quantity] == words(rated("MVR2", -0.6))[quantity] == "reproduced"
    assert words(rated("MVR2", -0.3))[quantity] == "not reproduced"


@pytest.mark.parametrize(("exact", "word"), [(-0.4, "reproduced"), (-0.25, "not reproduced"), (-0.1, "not reproduced")])
def test_mvr2_must_fall_faster_and_lie_below(exact, word):
    found = words(rated("MVR1", -0.25) + rated("MVR2", exact))
    assert found["MVR2's exponent is below MVR1's"] == found["MVR2 ahead of MVR1 on the synthetic problem"] == word


def finals(part, name, losses):
    run = {"config": dataclasses.asdict(SMALL)}
    case = {"part": part, "phase": "final", "optimizer": name, "lr": 0.01}
    return [{**case, "seed": seed, "loss": loss, "run": run} for seed, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ((1.0, 1.1, 0.9), "reproduced"),
        ((2.0, 2.1, 1.9), "not reproduced"),
        ((1.5, 1.4, 1.7), "not reproduced"),
        ((1.0, math.inf, 0.9), "not reproduced"),
    ],
)
@pytest.mark.parametrize("part", ["images", "text"])
def test_below_muon_is_claimed_with_a_small_p_alone(part, ours, word):
    found = finals(part, "Muon", (1.5, 1.6, 1.42)) + finals(part, "MARS-M", ours)
    (verdict, *_) = variance_reduction.check(found)
    assert verdict.verdict == word and "n = 3" in verdict.why
    assert ("no difference seen" in verdict.why) == (ours[0] == 1.5 or math.inf in ours)


def test_the_contenders_are_the_published_rules():
    model = torch.nn.Linear(4, 4, bias=False)
    for name, (preset, options, tuned) in networks.RULES.items():
        params = {"lr": 0.01, "aux_lr": 0.02, **({"gamma": 0.05} if tuned else {})}
        optimizer = networks.build(name, model, params)
        signal = optimizer.rule(optimizer.param_groups[0]).signal
        assert type(optimizer) is preset and optimizer.param_groups[0]["weight_decay"] == 0.1
        if name != "Muon":
            expected = {"MVR1": (0.05, True, False), "MVR2": (0.05, True, True), "STORM": (1.0, False, True)}
            assert (signal.gamma, signal.clip, signal.exact) == expected.get(name, (0.05, False, False))
        contender = networks.contender(name)
        assert contender.closure == bool(options.get("exact")) and contender.gradients == (2 if contender.closure else 1)


def test_the_best_first_lr_on_an_edge_is_named():
    tried = [{**rated("MVR1", -0.3)[0], "phase": "tune", "lr": lr} for lr in (0.5, 1.0)]
    found = rated("MVR1", -0.3) + rated("MVR2", -0.4) + tried
    (why,) = [v.why for v in variance_reduction.check(found) if v.quantity.startswith("MVR2 ahead")]
    assert "edge of its range for MVR1;" in why and not verdicts._on_edge(found, "MVR2")


@pytest.mark.parametrize("wrong", [{"lrs": ()}, {"lrs": (0.0,)}, {"trials": 0}, {"evaluations": 0}, {"copies": 0}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(InputError, match="--lrs must be positive"):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize("flag", ["images", "text"])
def test_missing_data_are_named_before_anything_is_measured(tmp_path, flag):
    ledger = Ledger(None, {})
    with pytest.raises(InputError, match="nowhere"):
        variance_reduction.run(dataclasses.replace(SMALL, **{flag: str(tmp_path / "nowhere")}), ledger)
    assert ledger.rows == []
