"""The experiment on error feedback: its pieces against literal loops, its bytes, and verdicts that notice doctored rows."""

import copy
import dataclasses
import math

import pytest
import torch

from schatten.compressors import Identity, TopK
from schatten.lab.errors import InputError
from schatten.lab.experiments import error_feedback
from schatten.lab.experiments.error_feedback import polars, problems, training
from schatten.lab.experiments.error_feedback.verdicts import slope
from schatten.lab.ledger import Ledger

SMALL = dataclasses.replace(
    error_feedback.EXPERIMENT.quick,
    seeds=2,
    hidden=(8,),
    target=2.2,
    workers=2,
    batch=4,
    steps=6,
    every=2,
    trials=3,
    rank=1,
    horizons=(8, 16),
    place_steps=40,
    size=12,
)


def rows_of(config):
    ledger = Ledger(None, {})
    error_feedback.EXPERIMENT.run(config, ledger)
    return ledger.rows


@pytest.fixture(scope="module")
def rows():
    return rows_of(SMALL)


def verdict_of(rows, quantity):
    return next(v for v in error_feedback.EXPERIMENT.check(rows) if v.quantity.startswith(quantity))


def polar(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


# -- pieces against literal loops --------------------------------------------------------------------------------------


def test_feedback_on_the_gradient_is_the_written_algorithm():
    problem, C, lrs = problems.pulling(3), TopK(0.5), [0.3, 0.2, 0.1, 0.05]
    X = torch.zeros(16, 8, dtype=torch.float64)
    E = [torch.zeros_like(X) for _ in range(4)]
    for lr in lrs:
        for j, G in enumerate(problem.gradients(X)):
            R = G - E[j]
            E[j] = E[j] + R * (R.abs() >= R.abs().flatten().topk(64).values[-1])
        X = X - lr * polar(sum(E) / 4)
    *_, last = problems.iterates(problem, "feedback on the gradient", C, lrs)
    # Four steps in fp64. Half of the entries leave full rank: of a singular mean each SVD has a polar factor of its own.
    torch.testing.assert_close(last, X, rtol=0, atol=1e-10)


def test_feedback_on_the_polar_factor_is_the_written_algorithm():
    problem, C, lrs = problems.pulling(1), TopK(0.1), [0.3, 0.2, 0.1]
    X = torch.zeros(16, 8, dtype=torch.float64)
    E = [torch.zeros_like(X) for _ in range(4)]
    for lr in lrs:
        for j, G in enumerate(problem.gradients(X)):
            R = polar(G) - E[j]
            E[j] = E[j] + R * (R.abs() >= R.abs().flatten().topk(13).values[-1])
        X = X - lr * sum(E) / 4
    *_, last = problems.iterates(problem, "feedback on the polar factor", C, lrs)
    # As above; the identity map takes another exact SVD.
    torch.testing.assert_close(last, X, rtol=0, atol=1e-9)


def test_gradients_are_those_of_the_losses():
    for problem in (problems.pulling(0), problems.slope()):
        X = torch.randn(problem.start.shape, dtype=torch.float64)
        Z = torch.randn_like(X)
        slope_along = (problem.loss(X + 1e-5 * Z) - problem.loss(X - 1e-5 * Z)) / 2e-5
        mean = sum(problem.gradients(X)) / problem.workers
        # Central differences of smooth functions: 1e-10 of curvature and 1e-16 / 1e-5 of rounding.
        assert slope_along == pytest.approx(float((mean * Z).sum()), rel=1e-6, abs=1e-8)


def test_the_largest_entry_of_the_misleading_polar_factor_has_the_wrong_sign():
    G = torch.tensor(problems.MISLEADING, dtype=torch.float64)
    D = polar(G)
    top, second = D.abs().flatten().topk(2).values
    assert D.abs().argmax() == 0 and D[0, 0] * G[0, 0] < 0 and top - second > 0.03


def test_without_feedback_h_grows_by_the_same_amount_in_every_step():
    G = torch.tensor(problems.MISLEADING, dtype=torch.float64)
    problem = problems.slope()
    seen = list(problems.iterates(problem, "no feedback, on the polar factor", TopK(1 / 9), [0.5] * 20))
    h = [1 + float((G / G.norm() * X).sum()) for X in seen]
    growth = 0.5 * float(polar(G)[0, 0]) / float(G.norm())
    assert h == pytest.approx([1 + growth * k for k in range(21)], rel=1e-12)


def test_the_mean_square_length_is_c_plus_one_minus_c_over_n():
    generator = torch.Generator().manual_seed(0)
    G = polars.signal("flat", (6, 6), generator)
    assert polar(G).sub(G).abs().max() < 1e-12
    factors = polar(G + 0.4 * torch.randn(2000, 6, 6, generator=generator, dtype=torch.float64))
    mean = factors.mean(0)
    c = (float(mean.square().sum()) * 2000 - 6) / 1999 / 6
    squares = [polars.shrink(G, 0.4, 5, generator) ** 2 for _ in range(600)]
    # 600 draws whose squares spread by less than 0.1: three standard errors.
    assert sum(squares) / 600 == pytest.approx(c + (1 - c) / 5, abs=0.3 / math.sqrt(600))


def test_noise_of_the_frobenius_unit_is_as_large_as_the_signal():
    G = polars.signal("k^-1", (40, 40), torch.Generator().manual_seed(0))
    noise = polars.UNITS["Frobenius norm"](G) * torch.randn(40, 40, dtype=torch.float64)
    # 1600 entries: the norm of the noise spreads by 1 / sqrt(3200).
    assert float(noise.norm() / G.norm()) == pytest.approx(1, abs=5 / math.sqrt(3200))


def test_the_slope_of_a_power_is_its_exponent():
    assert slope([8, 32, 128], [3 * K**-0.5 for K in (8, 32, 128)]) == pytest.approx(-0.5)


def test_bytes_are_those_of_the_messages():
    task = training.task("digits", (8,), (1, 1, 1, 1), "byte")
    setting = training.Setting(workers=3, batch=2, steps=4, every=2, target=0.0)
    params = {"lr": 0.01, "weight_decay": 0.0}
    plain, sparse, both = (
        training.train(task, training.Method("", C, back), params, setting, 0)
        for C, back in ((Identity(), Identity()), (TopK(0.1), Identity()), (TopK(0.1), TopK(0.1)))
    )
    # 8 x 64 and 10 x 8 in fp32 for each of 3 workers in each of 4 steps; a value of four bytes and a place of two.
    assert plain["curve"][-1][2] == plain["curve"][-1][3] == 4 * 3 * 4 * (512 + 80)
    assert sparse["curve"][-1][2] == 4 * 3 * 6 * (52 + 8)
    assert sparse["curve"][-1][3] == plain["curve"][-1][3]
    assert both["curve"][-1][2] == both["curve"][-1][3] == sparse["curve"][-1][2]
    assert [row[0] for row in plain["curve"]] == [2, 4] and plain["steps"] == math.inf


def test_a_text_trains_embeddings_by_sign_and_norms_by_adamw(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be " * 40)
    task = training.task(str(file), (8,), (8, 1, 1, 8), "byte")
    model = task.model()
    assert {"table_lr", "aux_lr"} < set(training.space(model))
    params = {"lr": 0.01, "table_lr": 0.01, "aux_lr": 0.01, "weight_decay": 0.0}
    opt = training.build(model, training.methods(1)[2], params, 2)
    kinds = [(g["algorithm"], len(g["params"])) for g in opt.param_groups]
    assert kinds == [("spectral", 6), ("spectral", 2), ("adamw", 3)]
    found = training.train(task, training.methods(1)[2], params, training.Setting(2, 2, 2, 1, 0.0), 0)
    assert len(found["curve"]) == 2 and math.isfinite(found["loss"])


# -- the run and its verdicts ------------------------------------------------------------------------------------------


def test_a_small_run_has_all_verdicts_and_both_pictures(rows):
    quantities = [v.quantity for v in error_feedback.EXPERIMENT.check(rows)]
    assert len(quantities) == len(set(quantities)) == 8 + 4 + 2 + 2
    figures = error_feedback.EXPERIMENT.pictures(rows)
    assert set(figures) == set(error_feedback.EXPERIMENT.captions) == {"bytes", "polars"}
    assert verdict_of(rows, "bytes to the server, uncompressed over compressed").verdict == "out of reach here"
    assert verdict_of(rows, "compressing after the polar step").verdict == "reproduced"


@pytest.mark.parametrize("part", ["bytes", "rate", "place", "polars"])
def test_rows_of_one_part_alone_are_judged(rows, part):
    own = [row for row in rows if row["part"] == part]
    assert error_feedback.EXPERIMENT.check(own)
    error_feedback.EXPERIMENT.pictures(own)
    error_feedback.EXPERIMENT.check(own[:1])


def doctored(rows, change, **wanted):
    changed = copy.deepcopy(rows)
    for row in changed:
        if all(row.get(k) == v for k, v in wanted.items()):
            change(row)
    return changed


def test_a_compressor_that_needs_more_bytes_is_not_reproduced(rows):
    def arrive(row):
        up = 10_000 if row["method"] == "uncompressed" else 100 + row["seed"]
        row.update(up=up, down=10_000, steps=10)

    fine = doctored(rows, arrive, part="bytes", phase="final")
    assert verdict_of(fine, "bytes to the server, uncompressed over Sign").verdict == "reproduced"
    worse = doctored(fine, lambda row: row.update(up=20_000 + row["seed"]), method="Sign")
    assert verdict_of(worse, "bytes to the server, uncompressed over Sign").verdict == "not reproduced"
    lost = doctored(fine, lambda row: row.update(up=math.inf, down=math.inf, steps=math.inf), method="Sign", seed=1)
    assert verdict_of(lost, "bytes to the server, uncompressed over Sign").verdict == "not reproduced"
    large = doctored(fine, lambda row: row.update(parameters=124e6), part="bytes")
    assert verdict_of(large, "bytes to the server, uncompressed over compressed").verdict == "reproduced"


@pytest.mark.parametrize(("exponent", "word"), [(-0.5, "reproduced"), (-0.4, "not reproduced")])
def test_a_slower_rate_is_not_reproduced(rows, exponent, word):
    changed = doctored(rows, lambda row: row.update(mean=row["steps"] ** exponent), part="rate")
    assert verdict_of(changed, "exponent of K in the mean ||grad f||_*: TopK(share=0.1), feedback both").verdict == word


def test_a_polar_factor_whose_feedback_arrives_is_no_failure(rows):
    failing = doctored(rows, lambda row: row.update(gap=0.1), part="place", way="feedback on the polar factor")
    failing = doctored(failing, lambda row: row.update(gap=1e-6), part="place", way="feedback on the gradient")
    assert verdict_of(failing, "error feedback on the polar factor").verdict == "reproduced"
    arriving = doctored(failing, lambda row: row.update(gap=1e-4), part="place", way="feedback on the polar factor")
    assert verdict_of(arriving, "error feedback on the polar factor").verdict == "not reproduced"
    nowhere = doctored(failing, lambda row: row.update(gap=0.1), part="place", way="feedback on the gradient")
    assert verdict_of(nowhere, "error feedback on the polar factor").verdict == "not reproduced"


def test_lengths_far_from_the_published_are_not_reproduced(rows):
    def length(value):
        return lambda row: row.update(by_workers=[(11, value)])

    changed = doctored(rows, length(0.9), part="polars")
    assert verdict_of(changed, "length of the mean").verdict == "not reproduced"
    changed = doctored(changed, length(0.775), part="polars", unit="Frobenius norm", signal="flat")
    assert verdict_of(changed, "length of the mean").verdict == "reproduced"
    assert verdict_of(changed, "the pair").verdict == "not reproduced"
    changed = doctored(changed, length(0.552), part="polars", unit="Frobenius norm", signal="k^-1")
    assert verdict_of(changed, "the pair").verdict == "reproduced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpt": (1, 2)}, "--gpt needs context"),
        ({"workers": 0}, "--workers must be at least 1"),
        ({"target": -1.0}, "--target must be above 0"),
        ({"data": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, message):
    nothing_before = {"seeds": 0, **change}
    with pytest.raises(InputError, match=message):
        rows_of(dataclasses.replace(SMALL, **nothing_before))
