"""spectral_powers: the paper's choice of parameters and rule, what is read off a run, and verdicts that planted rows change."""

import dataclasses
import math

import pytest
import torch

from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.experiments import spectral_powers as experiment
from schatten.lab.experiments.spectral_powers import variants
from schatten.lab.experiments.spectral_powers.comparison import check
from schatten.lab.experiments.spectral_powers.pictures import CAPTIONS, pictures
from schatten.lab.experiments.spectral_powers.published import ADAM, BEST, BEST_LR, LOSSES, MSGD, POWERS, name
from schatten.lab.experiments.spectral_powers.reading import by_variant, whole_grids
from schatten.lab.fit import Fit
from schatten.lab.ledger import Ledger
from schatten.lab.models import GPT, GPTConfig

TINY = experiment.Config(
    seeds=2, between=(0.75,), width=8, context=8, batch=2, steps=2, warmup=1, eval_windows=4, lrs=2, factor=4.0
)
CONFIG = dataclasses.asdict(experiment.EXPERIMENT.quick)


@pytest.fixture(scope="module")
def rows():
    ledger = Ledger(None, dataclasses.asdict(TINY))
    experiment.run(TINY, ledger)
    return ledger.rows


def as_published(config=CONFIG, seeds=3, noise=1e-4):
    """Rows as a run would leave them that finds what the paper found, seeds a little apart."""
    found = []
    for (family, p), losses in LOSSES.items():
        case = {"family": family, "p": p, "optimizer": name(family, p), "run": {"config": config}, "steps": 1}
        spikes = 0.1 + (family == MSGD)
        seconds = 157.6 if (family, p) == (MSGD, 0.0) else 12.0
        # Ranges that orthogonalisation widens, on grids of six: flat for p = 0, one good lr for p = 1.
        steep = {0.0: 0.0, 0.25: 0.1, 0.5: 0.2, 1.0: 1.0}[p]
        for seed in (1000, *range(seeds)):
            for lr in losses:
                best = lr == BEST_LR[family, p]
                phase = "tune" if seed == 1000 else "final" if best else "grid"
                if phase == "grid" and ((family, p) not in experiment.WIDTHS or seed > 1):
                    continue
                score = BEST[family, p] + (0 if best else steep + 0.001) + noise * seed * (p + 1) * (1 + (family == ADAM))
                row = {"phase": phase, "lr": lr, "seed": seed, "score": score, "spike": spikes + noise * seed}
                found.append({**case, **row, "seconds": seconds, "optimizer_seconds": seconds - 6})
    return found


def words(rows):
    return {v.quantity: v.verdict for v in check(rows)}


def finals_set(rows, key, score):
    """The rows with other scores of a variant's seeds."""
    return [{**row, "score": score(row)} if (row["family"], row["p"]) == key else row for row in rows]


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_what_the_paper_found_is_reproduced_and_the_independent_run_is_not():
    found = words(as_published())
    numbers = {q: word for q, word in found.items() if q.startswith(("best validation loss", "time of"))}
    assert len(numbers) == 9 and set(numbers.values()) == {OUT_OF_REACH}
    orders = {q: word for q, word in found.items() if q not in numbers}
    independent = {q for q in orders if "independent" in q}
    assert len(orders) == 10 and len(independent) == 2
    assert {q for q, word in orders.items() if word == NOT_REPRODUCED} == independent
    assert set(orders.values()) == {REPRODUCED, NOT_REPRODUCED}


def test_at_the_published_size_the_numbers_have_verdicts_of_their_own():
    full = dataclasses.asdict(experiment.EXPERIMENT.full)
    found = words(as_published(full))
    assert [found[q] for q in found if q.startswith("best validation loss")] == [REPRODUCED] * 8
    off = finals_set(as_published(full), (ADAM, 0.5), lambda row: row["score"] + 0.02)
    assert words(off)["best validation loss, AdamS (p = 0.5), GPT-2 124M"] == NOT_REPRODUCED


@pytest.mark.parametrize(
    ("quantity", "change"),
    [
        ("Adam beats Muon", lambda rows: finals_set(rows, (MSGD, 0.0), lambda row: row["score"] - 0.1)),
        # The same means, but seeds so far apart that n = 3 shows no difference.
        ("Adam beats Muon", lambda rows: finals_set(rows, (MSGD, 0.0), lambda row: 2.887 + (row["seed"] - 1) * 0.05)),
        ("spread of the bests", lambda rows: finals_set(rows, (ADAM, 1.0), lambda row: row["score"] + 1)),
        ("AdamS is the best", lambda rows: finals_set(rows, (ADAM, 1.0), lambda row: row["score"] - 0.1)),
        (
            "p = 0 does not",
            lambda rows: [{**row, "score": row["score"] - 0.1 * (row["p"] == 0)} for row in rows],
        ),
        ("best lr of mSGD falls", lambda rows: [{**row, "lr": row["lr"] / (1 + 999 * (row["p"] == 1))} for row in rows]),
        ("more stably", lambda rows: [{**row, "spike": 1 - row["spike"]} for row in rows]),
        (
            "usable lr range",
            lambda rows: finals_set(rows, (MSGD, 0.0), lambda row: row["score"] + (row["phase"] != "final")),
        ),
    ],
)
def test_planted_rows_are_not_reproduced(quantity, change):
    found, planted = words(as_published()), words(change(as_published()))
    (key,) = (q for q in found if quantity in q)
    assert found[key] == REPRODUCED and planted[key] == NOT_REPRODUCED


def test_one_seed_claims_no_order():
    found = words(as_published(seeds=1))
    for quantity in (
        "Adam beats Muon (124M)",
        "AdamS is the best of all",
        "spread of the bests over p: less in the Adam family",
    ):
        assert found[quantity] == NOT_REPRODUCED


def test_any_part_of_the_rows_has_verdicts_and_pictures(rows):
    assert check([]) == [] and pictures([]) == {}
    for count in (1, 3, len(rows) // 2):
        check(rows[:count])
        pictures(rows[:count])
    check([row for row in rows if row["family"] == ADAM])
    lost = [{**row, "score": math.inf, "spike": math.inf} for row in as_published()]
    assert NOT_REPRODUCED in words(lost).values() and set(pictures(lost)) == set(CAPTIONS)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_tunes_the_eight_alike_and_measures_the_rest(rows):
    tune, final, grid, between = (by_variant(rows, phase) for phase in ("tune", "final", "grid", "between"))
    assert set(tune) == set(final) == set(LOSSES)
    assert {len(own) for own in tune.values()} == {TINY.lrs} and {len(own) for own in final.values()} == {TINY.seeds}
    assert {key: len(own) for key, own in between.items()} == {(MSGD, 0.75): 2, (ADAM, 0.75): 2}
    for key in experiment.WIDTHS:
        assert len(grid[key]) == 1 and len(whole_grids(rows, key)) == TINY.seeds
    # The best of the trials is what the seeds ran with.
    for key, own in final.items():
        assert own[0]["lr"] == min(tune[key], key=lambda row: row["score"])["lr"]
    assert len(words(rows)) == 19 and set(pictures(rows)) == set(CAPTIONS)


def test_an_interpolated_lr_is_the_geometric_mean_of_its_neighbours():
    best = {0.0: 0.01, 0.25: 0.02, 0.5: 0.1, 1.0: 0.4}
    assert variants.between(0.75, best) == 0.2
    assert variants.between(0.125, best) == pytest.approx(0.014)


@pytest.mark.parametrize("family", [MSGD, ADAM])
def test_the_update_of_every_tensor_is_the_papers(family):
    """p = 1, where the power is the identity, in fp64: both by the same arithmetic, so to 1e-12."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, 4, 1, 2, 8)).double()
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    opt = variants.build(model, family, 1.0, 0.1, released=False)
    first, second = ({key: torch.zeros_like(w) for key, w in weights.items()} for _ in range(2))
    for t in (1, 2, 3):
        for key, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if family == MSGD and p.ndim >= 2:
                first[key] = 0.9 * first[key] + p.grad
                weights[key] -= 0.1 * first[key]
            else:
                first[key] = 0.9 * first[key] + 0.1 * p.grad
                second[key] = 0.95 * second[key] + 0.05 * p.grad**2
                ratio = first[key] / (1 - 0.9**t) / ((second[key] / (1 - 0.95**t)).sqrt() + 1e-8)
                weights[key] -= (0.1 if p.ndim >= 2 else 3e-4) * ratio
        opt.step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("released", [False, True])
def test_powers_are_taken_of_embeddings_too(p, released):
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 16, 1, 2, 8))
    before = model.tokens.weight.detach().clone()
    opt = variants.build(model, MSGD, p, 1.0, released)
    for q in model.parameters():
        q.grad = torch.randn_like(q)
    G = model.tokens.weight.grad
    assert G is not None
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    expected = (U * s**p) @ Vh * (math.sqrt(24 / 8) if p == 0 else 1)
    opt.step()
    found = (before - model.tokens.weight.detach()).double()
    # polynomial() ends within 0.16 of one, 15 released quintics in bf16 within [0.68, 1.14]; the tower is off by up to 2 %,
    # the coupled iteration, at a condition below 10, by its ridge of 1e-4, and p = 1 is the gradient.
    tolerance = {0.0: 0.33 if released else 0.17, 1.0: 1e-6}.get(p, 1e-3 if released else 0.02)
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_the_full_size_is_the_published_one():
    full = experiment.EXPERIMENT.full
    assert full.batch * full.context * full.steps == 98_304_000_000
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(full.vocabulary, full.context, full.layers, full.heads, full.width))
    # 124 million as GPT-2 small is counted, without biases, with 50304 rows and positions.
    assert sum(p.numel() for p in model.parameters()) == 124_373_760
    for family, p in LOSSES:
        assert variants.grid(family, p, full.lrs, full.factor, full.published) == list(LOSSES[family, p])
    with pytest.raises(InputError, match="--data openwebtext does not exist"):
        experiment.run(full, Ledger(None, {}))


# -- what is read off a run --------------------------------------------------------------------------------------------


def test_the_published_table_has_the_spreads_and_rates_that_are_cited():
    for family, spread in ((ADAM, 0.009), (MSGD, 0.216)):
        own = [loss for (f, _), loss in BEST.items() if f == family]
        assert max(own) - min(own) == pytest.approx(spread, abs=1e-9)
    assert [BEST_LR[MSGD, p] for p in reversed(POWERS)] == [5.0, 0.2, 0.04, 0.007]
    assert BEST_LR[ADAM, 0.5] == 1e-2 and min(BEST.values()) == BEST[ADAM, 0.5] == 2.870


def test_a_width_is_interpolated_in_log_lr_and_says_when_the_grid_ends():
    # Up to 2.1: half a decade below 1, where the loss rises by 0.2 a decade, and a quarter above 10, where by 0.4.
    losses = {0.1: 2.2, 1.0: 2.0, 10.0: 2.0, 100.0: 2.4}
    factor, open_ = variants.width(losses, 2.1)
    assert factor == pytest.approx(10**1.75) and not open_
    assert variants.width({1.0: 2.0, 10.0: 2.05}, 2.1) == (10.0, True)
    # Beyond a diverged neighbour nothing is usable, and what follows a bad lr does not count.
    assert variants.width({1.0: 2.0, 10.0: math.inf, 100.0: 2.0}, 2.1) == (1.0, True)
    assert variants.width({1.0: math.inf, 10.0: math.inf}, math.inf) == (1.0, False)
    assert variants.width(losses, 1.9) == (1.0, False)


def test_a_spike_is_the_rise_above_the_lowest_earlier_mean():
    assert variants.spike([5.0, 4.0, 3.0, 3.5, 2.0], window=1) == 0.5
    assert variants.spike([4.0, 2.0, 4.0, 2.0], window=2) == 0.0
    assert variants.spike([3.0, 2.0, 6.0, 1.0, 4.0], window=1) == 4.0
    assert variants.spike([3.0, math.nan], window=1) == math.inf


def test_a_run_above_the_uniform_guess_has_diverged():
    good = Fit(loss=2.0, curve=[(1, 1.9), (2, 2.0)])
    assert variants.score(good, 256) == 1.9
    assert variants.score(Fit(loss=5.6, curve=[(1, 3.0), (2, 5.6)]), 256) == math.inf
    assert variants.score(dataclasses.replace(good, diverged=True), 256) == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"between": (0.5, 1.5)}, r"--between must lie within \(0, 1\), got 1.5"),
        ({"vocabulary": 100}, "--vocabulary 100 is less than the 256 tokens of --data pydoc"),
        ({"data": "no-such-folder"}, "--data no-such-folder does not exist"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(change, message):
    ledger = Ledger(None, {})
    with pytest.raises(InputError, match=message):
        experiment.run(dataclasses.replace(TINY, **change), ledger)
    assert ledger.rows == []
