"""The experiment on zero-order fine-tuning: counted passes, the baseline's literal loop, memory, and doctored rows."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from schatten.lab.errors import InputError
from schatten.lab.experiments import zero_order
from schatten.lab.experiments.zero_order import shifted
from schatten.lab.experiments.zero_order.contenders import JAGUAR, LR, contenders, trained
from schatten.lab.experiments.zero_order.random_direction import RandomDirection
from schatten.lab.fit import Loop
from schatten.lab.ledger import Ledger

SMALL = dataclasses.replace(
    zero_order.EXPERIMENT.quick,
    seeds=2,
    hidden=(8,),
    batch=8,
    pretraining=3,
    passes=12,
    every=6,
    target=0.1,
    trials=1,
    weights=("all", "lora"),
    rank=2,
)


def rows_of(config, folder=None):
    ledger = Ledger(folder, {})
    zero_order.EXPERIMENT.run(config, ledger)
    return ledger.rows


@pytest.fixture(scope="module")
def rows():
    return rows_of(SMALL)


def verdict_of(rows, quantity):
    return next(v for v in zero_order.EXPERIMENT.check(rows) if v.quantity.startswith(quantity))


def digits(rank=0):
    before, after = shifted.tasks("digits", "", "byte", (8,), (1, 1, 1, 1))
    return before, shifted.adapted(after, shifted.pretrained(before, Loop(2, 8), 0, None), rank)


# -- the baseline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
def test_the_random_direction_is_the_written_algorithm(signed):
    target = torch.randn(5, 3, dtype=torch.float64)
    W = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    expected, eps, lr = W.detach().clone(), 1e-3, 0.01
    opt = RandomDirection([W], lr, eps, signed, seed=7)

    def f(X):
        return (X - target).square().sum()

    for step in range(6):
        Z = torch.randn(5, 3, generator=torch.Generator().manual_seed(7 + step), dtype=torch.float64)
        rho = float(f(expected + eps * Z) - f(expected - eps * Z)) / (2 * eps)
        expected -= lr * (math.copysign(1, rho) if signed else rho) * Z
        opt.step(lambda: f(W))
    # Differences of losses near 10 over 2e-3: rounding of 1e-12 a step, times lr.
    torch.testing.assert_close(W.detach(), expected, rtol=0, atol=1e-10)


def test_the_mean_direction_is_the_gradient():
    G = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    moves = []
    for seed in range(1000):
        W = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
        RandomDirection([W], 1.0, seed=seed).step(lambda W=W: (G * W).sum())
        moves.append(-W.detach())
    # An entry's variance is ||G||^2 + G_ij^2 < 10: five standard errors.
    assert (torch.stack(moves).mean(0) - G).abs().max() < 5 * math.sqrt(10 / 1000)


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LR)
def test_passes_are_the_models_own_calls_and_twice_its_backwards(name, monkeypatch):
    _, task = digits()
    contender = next(c for c in contenders(task.model()) if c.name == name)
    seen = {"forwards": 0, "backwards": 0}
    build = task.build

    def watched():
        model = build()

        def hook(*_):
            seen["forwards"] += model.training
            seen["backwards"] += torch.is_grad_enabled()

        model.register_forward_hook(hook)
        return model

    params = {"lr": 1e-3, **{key: space[0] for key, space in contender.space.items() if key != "lr"}}
    budget = shifted.Budget(12, 8, 6, 1e-3)
    found = shifted.tuned(dataclasses.replace(task, build=watched), contender, params, budget, 0)
    assert found["spent"] == 12 == seen["forwards"] + 2 * seen["backwards"]
    assert found["steps"] == (6 if contender.zero_order else 4) and found["passes"] == math.inf
    assert [passes for passes, _ in found["curve"]] == [6, 12]


def test_a_run_ends_where_it_reaches_the_target():
    _, task = digits()
    contender = contenders(task.model())[-1]
    found = shifted.tuned(task, contender, {"lr": 1e-3, "weight_decay": 0.0}, shifted.Budget(60, 8, 6, 50.0), 0)
    assert found["passes"] == found["spent"] == found["score"] == 6


def test_memory_is_that_of_the_rules():
    _, task = digits()
    found = {
        c.name: shifted.memory(task, c, {"lr": 1e-3, **{k: v[0] for k, v in c.space.items() if k != "lr"}}, 8)
        for c in contenders(task.model())
    }
    d = 64 * 8 + 8 * 10
    assert all(row["d"] == d for row in found.values())
    # Counters of steps and skipped steps are some numbers beside the tensors.
    assert found["random direction"]["held"] == 1
    assert found["AdamW"]["held"] == pytest.approx(3, abs=0.01) and found["Muon"]["held"] == pytest.approx(2, abs=0.01)
    assert found[JAGUAR]["held"] == pytest.approx(2 + (64 + 8 + 8 + 10) / d, abs=0.01)
    # A copy of all weights beside moved ones; a gradient; a single direction of the largest matrix.
    assert found[JAGUAR]["extra"] > 2 and found["AdamW"]["extra"] > 1
    assert found["random direction"]["extra"] < found[JAGUAR]["extra"]


# -- the tasks ---------------------------------------------------------------------------------------------------------


def test_moved_digits_are_the_same_one_pixel_on_and_the_model_is_pretrained():
    before, after = shifted.tasks("digits", "", "byte", (8,), (1, 1, 1, 1))
    assert torch.equal(after.data.train[..., 1:], before.data.train[..., :-1])
    weights = shifted.pretrained(before, Loop(3, 8), 0, None)
    again = shifted.pretrained(before, Loop(3, 8), 0, None)
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    assert all(torch.equal(v, weights[k]) for k, v in shifted.adapted(after, weights, 0).model().state_dict().items())


def test_pretrained_weights_are_kept_in_the_folder(tmp_path):
    before, _ = shifted.tasks("digits", "", "byte", (8,), (1, 1, 1, 1))
    weights = shifted.pretrained(before, Loop(2, 8), 0, tmp_path / "kept")
    read = shifted.pretrained(before, Loop(0, 8), 1, tmp_path / "kept")
    assert all(torch.equal(weights[k], read[k]) for k in weights)


def test_lora_begins_at_the_pretrained_model_and_trains_factors_alone():
    _, task = digits()
    _, low = digits(rank=2)
    images, _ = task.batch(4, seed=0, step=0)
    torch.manual_seed(0)
    plain, model = task.model(), low.model()
    torch.testing.assert_close(model(images), plain(images))
    assert sum(p.numel() for p in trained(model)) == 2 * (64 + 8) + 2 * (8 + 10)


def test_a_gpt_is_fine_tuned_on_a_second_text(tmp_path):
    for name, text in (("a", "one two three "), ("b", "vier fuenf sechs ")):
        (tmp_path / name).write_text(text * 40)
    small = dataclasses.replace(SMALL, seeds=1, data=str(tmp_path / "b"), source=str(tmp_path / "a"), gpt=(8, 1, 1, 8))
    rows = rows_of(dataclasses.replace(small, weights=("all",), tokens="byte", passes=6))
    assert all(math.isfinite(row["loss"]) for row in rows if row["phase"] == "final")
    assert next(row for row in rows if row["optimizer"] == "Muon")["aux_lr"] > 0
    with pytest.raises(InputError, match="--data and --source must have one vocabulary"):
        rows_of(dataclasses.replace(small, tokens="char"))


# -- the run and its verdicts ------------------------------------------------------------------------------------------


def test_a_small_run_has_verdicts_for_both_kinds_of_weights_and_a_picture(rows):
    verdicts = zero_order.EXPERIMENT.check(rows)
    assert len(verdicts) == 2 * (1 + 1 + 5)
    assert set(zero_order.EXPERIMENT.pictures(rows)) == set(zero_order.EXPERIMENT.captions)
    assert {v.verdict for v in verdicts if v.quantity.startswith("forward passes")} == {"out of reach here"}
    for part in ("tune", "final", "memory"):
        some = [row for row in rows if row["phase"] == part][:1]
        zero_order.EXPERIMENT.check(some)
        zero_order.EXPERIMENT.pictures(some)


def with_passes(rows, ours, theirs):
    """Every JAGUAR Muon run arrives after `ours` passes and every other after `theirs`, spread a little over seeds."""
    changed = copy.deepcopy(rows)
    for row in changed:
        if row["phase"] == "final":
            row["budget"] = 1000
            row["passes"] = ours + row["seed"] if row["optimizer"] == JAGUAR else theirs + 2 * row["seed"]
    return changed


def test_verdicts_follow_the_passes(rows):
    slower, faster, equal = with_passes(rows, 900, 10), with_passes(rows, 10, 900), with_passes(rows, 100, 99)
    words = [verdict_of(r, f"forward passes, all: {JAGUAR} against AdamW").verdict for r in (slower, faster, equal)]
    assert words == ["not reproduced", "reproduced", "reproduced"]
    words = [verdict_of(r, f"forward passes, all: {JAGUAR} against JAGUAR sign").verdict for r in (slower, faster, equal)]
    assert words == ["not reproduced", "reproduced", "not reproduced"]
    assert "n = 2, p = " in verdict_of(slower, f"forward passes, all: {JAGUAR} against AdamW").why


def test_a_third_evaluation_or_another_buffer_is_noticed(rows):
    assert verdict_of(rows, "evaluations a step, all").verdict == "reproduced"
    changed = copy.deepcopy(rows)
    for row in changed:
        if row["phase"] == "final":
            row["spent"] += row["steps"]
        if row["phase"] == "memory":
            row["held"] = 3.0
    assert verdict_of(changed, "evaluations a step, all").verdict == "not reproduced"
    assert verdict_of(changed, "numbers held between steps, all").verdict == "not reproduced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpt": (1, 2, 3)}, "--gpt needs context"),
        ({"weights": ("some",)}, "--weights has no 'some': known are all, lora"),
        ({"target": 0.0}, "--target must be above 0, got 0"),
        ({"passes": 2}, "--passes must pay one step"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        rows_of(dataclasses.replace(SMALL, **change))
