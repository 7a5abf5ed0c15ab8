"""`tune`: equal trials, a function of seed and values, and every value it can be given."""

import math

import pytest

from schatten.lab.tuning import Span, tune

SPACE = {"lr": Span(1e-4, 1e-1), "momentum": Span(0.8, 0.99, log=False), "decay": [0.0, 0.1]}


def bowl(params):
    return (math.log10(params["lr"]) + 2) ** 2 + params["momentum"] + params["decay"]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_contender_gets_as_many_trials_and_the_best_is_among_them(sampler):
    tuned = tune(bowl, SPACE, 12, sampler=sampler)
    assert len(tuned.trials) == 12
    assert (tuned.params, tuned.loss) in tuned.trials
    assert tuned.loss == min(loss for _, loss in tuned.trials) == bowl(tuned.params)


def test_params_lie_within_their_spans_and_lists():
    for params, _ in tune(bowl, SPACE, 20, sampler="random").trials:
        assert 1e-4 <= params["lr"] <= 1e-1
        assert 0.8 <= params["momentum"] <= 0.99
        assert params["decay"] in (0.0, 0.1)


def test_a_logarithmic_span_is_drawn_evenly_over_decades():
    drawn = [params["x"] for params, _ in tune(lambda p: 0.0, {"x": Span(1e-4, 1.0)}, 60, sampler="random").trials]
    # Binomial(60, 1/2): 15 and 45 are 3.9 standard deviations from 30; on a linear scale one in a hundred lies below.
    assert 15 < sum(x < 1e-2 for x in drawn) < 45
    linear = [params["x"] for params, _ in tune(lambda p: 0.0, {"x": Span(1e-4, 1.0, log=False)}, 60, sampler="random").trials]
    assert sum(x < 1e-2 for x in linear) < 10


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_equal_seeds_repeat_the_trials_and_others_do_not(sampler):
    assert tune(bowl, SPACE, 15, seed=3, sampler=sampler) == tune(bowl, SPACE, 15, seed=3, sampler=sampler)
    assert tune(bowl, SPACE, 15, seed=3, sampler=sampler) != tune(bowl, SPACE, 15, seed=4, sampler=sampler)


def test_an_interrupted_run_whose_objective_remembers_measures_only_what_is_missing():
    known, measured = {}, []

    def remembering(params, limit=math.inf):
        key = tuple(params.items())
        if key not in known:
            if len(measured) >= limit:
                raise KeyboardInterrupt
            measured.append(key)
            known[key] = bowl(params)
        return known[key]

    with pytest.raises(KeyboardInterrupt):
        tune(lambda params: remembering(params, limit=14), SPACE, 25)
    assert len(measured) == 14
    resumed = tune(remembering, SPACE, 25)
    assert len(measured) == 25
    assert resumed == tune(bowl, SPACE, 25)


def test_a_grid_tries_every_point_once():
    space = {"lr": [1e-3, 1e-2, 1e-1], "decay": [0.0, 0.1]}
    tuned = tune(lambda p: abs(p["lr"] - 1e-2) + p["decay"], space, 6, sampler="grid")
    assert {tuple(params.values()) for params, _ in tuned.trials} == {(lr, d) for lr in space["lr"] for d in space["decay"]}
    assert len(tuned.trials) == 6
    assert tuned.params == {"lr": 1e-2, "decay": 0.0}


@pytest.mark.parametrize("trials", [5, 7])
def test_a_grid_of_another_size_than_trials_is_refused(trials):
    with pytest.raises(ValueError, match=f"space has 6, trials is {trials}"):
        tune(bowl, {"lr": [1, 2, 3], "decay": [0, 1]}, trials, sampler="grid")


def test_a_grid_of_spans_is_refused():
    with pytest.raises(ValueError, match="tries every point of lists"):
        tune(bowl, {"lr": Span(1, 2), "decay": [0, 1]}, 2, sampler="grid")


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_trial_counts_as_inf_and_never_wins(bad, sampler):
    tuned = tune(lambda p: bad if p["lr"] > 1e-2 else p["lr"], {"lr": Span(1e-4, 1e-1)}, 25, sampler=sampler)
    diverged = [params["lr"] for params, loss in tuned.trials if loss == math.inf]
    assert diverged and all(lr > 1e-2 for lr in diverged)
    assert len(tuned.trials) == 25
    assert tuned.loss == tuned.params["lr"] <= 1e-2


def test_where_all_diverge_the_loss_is_inf_and_params_are_those_of_a_trial():
    tuned = tune(lambda p: math.nan, {"lr": [1, 2, 3]}, 3, sampler="grid")
    assert tuned.loss == math.inf
    assert tuned.params in ({"lr": 1}, {"lr": 2}, {"lr": 3})


def test_tpe_looks_more_often_where_losses_are_low():
    tuned = tune(lambda p: (math.log10(p["lr"]) + 2.5) ** 2, {"lr": Span(1e-5, 1.0)}, 60)
    near = [abs(math.log10(params["lr"]) + 2.5) < 0.5 for params, _ in tuned.trials[20:]]
    # Of a uniform draw over five decades a fifth, 8 of 40; TPE with seed 0 has three times as many.
    assert sum(near) > 20
