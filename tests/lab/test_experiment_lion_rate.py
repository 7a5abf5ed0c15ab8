"""The experiment on Lion's rate: two-cycle and problem against literal loops, verdicts against doctored rows, a small run."""

import pytest
import torch

from schatten.lab import experiments
from schatten.lab.errors import InputError
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.experiments import lion_rate
from schatten.lab.experiments.lion_rate.rate import CONTRASTS, SCHEDULE, Stochastic, descend, slopes
from schatten.lab.experiments.lion_rate.two_cycle import PAIRS, cycle, cycle_exists, cycle_momentum
from schatten.lab.ledger import Ledger


def literal_cycle(beta1, beta2, lr, steps):
    theta, M, off = lr / 2, -lr * (1 - beta2) / (2 * (1 + beta2)), 0.0
    for t in range(steps):
        off = max(off, abs(theta - (-1) ** t * lr / 2))
        step = beta1 * M + (1 - beta1) * theta
        M = beta2 * M + (1 - beta2) * theta
        theta -= lr * ((step > 0) - (step < 0))
    return off / lr


def test_the_published_momentum_of_the_cycle():
    assert cycle_momentum(1.0, 0.99) == pytest.approx(1 / 398, rel=1e-12)


@pytest.mark.parametrize("betas", PAIRS)
def test_the_cycle_is_the_literal_one_and_exists_as_predicted(betas):
    found = cycle(betas, 0.1, 100)["off"]
    # One sign change more or less: a cycle is off by rounding, anything else by steps.
    assert found == pytest.approx(literal_cycle(*betas, 0.1, 100), abs=1e-9, rel=1e-6)
    assert (found < 1e-9) == cycle_exists(*betas)


def test_half_of_the_pairs_have_a_cycle():
    assert sum(cycle_exists(*betas) for betas in PAIRS) == len(PAIRS) / 2


def test_the_noise_is_unbiased_with_the_deviation_asked_for_and_a_skewed_sign():
    problem = Stochastic.draw(100, 2.0, [0, 1])
    noise = torch.stack([Z for Z, _ in zip(problem.disturbances(), range(1000), strict=False)])
    # 200,000 entries: five standard errors of the mean are 0.022, of the deviation 0.02.
    assert noise.shape == (1000, 2, 100) and abs(noise.mean()) < 0.025 and abs(noise.std() - 2) < 0.03
    assert (noise < 0).double().mean() == pytest.approx(0.9, abs=0.005)
    assert not torch.equal(noise[:, 0], noise[:, 1])


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_mean_residual_is_that_of_the_literal_loop(decay):
    lr, betas, steps = 0.02, (0.8, 0.9), 30
    found = descend(Stochastic.draw(10, 1.0, [4]), steps, lr, betas, decay)
    problem = Stochastic.draw(10, 1.0, [4])
    w, M, total = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64), 0.0
    for t, Z in zip(range(steps), problem.disturbances(), strict=False):
        G = problem.curvature * (w - problem.optimum[0])
        total += float(G.abs().sum() + decay * (w * G).sum()) * (t % 4 == 0)
        noisy = G + Z[0]
        step = torch.sign(betas[0] * M + (1 - betas[0]) * noisy)
        M = betas[1] * M + (1 - betas[1]) * noisy
        w = (1 - lr * decay) * w - lr * step
    assert found["kkt"] == pytest.approx([total / 8], rel=1e-9)


def rate_rows(exponent, way=SCHEDULE, decay=0.0, factor=1.0):
    lengths = (100, 200, 400, 800, 1600)
    wobble = (1.0, 1.01, 0.99)
    return [
        {"phase": "rate", "way": way, "steps": K, "decay": decay, "kkt": [factor * w * K**exponent for w in wobble]}
        for K in lengths
    ]


def verdicts(rows):
    return {v.quantity: v.verdict for v in lion_rate.check(rows)}


def test_the_fitted_exponent_is_that_of_a_power():
    assert slopes(rate_rows(-0.31)) == pytest.approx([-0.31] * 3)


def test_a_slower_decay_than_the_bound_is_not_reproduced():
    name = "exponent of K: mean ||grad f||_1"
    assert verdicts(rate_rows(-0.25))[name] == verdicts(rate_rows(-0.4))[name] == REPRODUCED
    assert verdicts(rate_rows(-0.2))[name] == NOT_REPRODUCED
    alone = [{**row, "kkt": row["kkt"][:1]} for row in rate_rows(-0.25)]
    assert verdicts(alone)[name] == OUT_OF_REACH


def test_a_schedule_that_is_not_lower_does_not_beat_constant_betas():
    other = list(CONTRASTS)[1]
    name = f"K = 1600: lower mean ||grad f||_1 than {other}"
    ours = rate_rows(-0.25)
    assert verdicts([*ours, *rate_rows(0.0, other)])[name] == REPRODUCED
    assert verdicts([*ours, *rate_rows(-0.25, other, factor=0.9)])[name] == NOT_REPRODUCED


def test_a_cycle_that_does_not_repeat_is_not_reproduced():
    cycles = [{"phase": "cycle", "betas": list(b), "lr": 0.1, "steps": 20, **cycle(b, 0.1, 20)} for b in PAIRS]
    names = (
        "two-cycle of Lion, betas (0.9, 0.99): theta = +-lr/2, M = -+lr/398",
        "the two-cycle exists iff (1 - beta1)(1 + beta2) > beta1 (1 - beta2)",
    )
    assert [verdicts(cycles)[name] for name in names] == [REPRODUCED] * 2
    assert [verdicts([{**cycles[0], "off": 1e-3}, *cycles[1:]])[name] for name in names] == [NOT_REPRODUCED] * 2
    stalled = {"phase": "stall", "lr": 0.1, "stall": 0.3}
    assert set(verdicts([stalled]).values()) == {NOT_REPRODUCED}


def test_a_small_run_has_verdicts_and_a_picture_and_as_many_trials_for_each():
    ledger = Ledger(None, {})
    experiment = experiments.load("lion-rate")
    experiment.run(lion_rate.Config(seeds=2, steps=(100, 140, 200), tuning_steps=100, cycle_steps=20), ledger)
    assert len(experiment.check(ledger.rows)) == 8
    assert set(experiment.pictures(ledger.rows)) == set(experiment.captions)
    trials = [row["way"] for row in ledger.rows if row["phase"] == "tune" and row["decay"] == 0]
    assert trials.count(SCHEDULE) == trials.count("constant betas") == 10
    lrs = {row["steps"]: row["lr"] for row in ledger.rows if row["phase"] == "rate" and row["way"] == SCHEDULE and row["decay"]}
    assert lrs[200] / lrs[100] == pytest.approx(2**-0.75)


def test_a_decay_of_zero_is_refused_by_name():
    with pytest.raises(InputError, match="--decay must be positive"):
        lion_rate.run(lion_rate.Config(decay=0.0), Ledger(None, {}))
