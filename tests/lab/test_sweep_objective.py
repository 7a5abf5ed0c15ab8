"""What a trial is scored by, and an optimizer built at a point of the space."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from schatten.lab import optimizers, sweep_space
from schatten.lab.errors import InputError
from schatten.lab.fit import fit
from schatten.lab.models import MLP
from schatten.lab.sweep import Objective, Sweep
from schatten.lab.sweep_plots import ceiling, parallel, sensitivity
from schatten.lab.sweep_report import verdict
from schatten.lab.sweep_results import Result, edges
from schatten.lab.tuning import Span

SMALL = Sweep(space={"lr": (0.01,)}, steps=6, width=8, layers=1, batch=8, eval_every=2)


@dataclasses.dataclass(frozen=True)
class Slope:
    """The loss is W . 1 + step; from training step `breaks` on it is nan."""

    breaks: float = math.inf

    def model(self):
        model = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            model.weight.normal_()
        return model

    def batch(self, size, *, seed, step):
        return (torch.full((1,), math.nan if step >= self.breaks else float(step)),)

    def loss(self, model, *batch):
        return model.weight.sum() + batch[0].sum()

    def evaluate(self, model, device):
        return {"loss": float(model.weight.detach().square().sum())}


def test_the_score_is_the_mean_over_seeds_of_the_final_loss():
    sweep = dataclasses.replace(SMALL, seeds=3)
    score = Objective(sweep, Slope(), "")({"lr": 0.01}, lambda step, loss: None)
    alone = []
    for seed in range(3):
        loop = sweep_loop(sweep)
        alone.append(fit(Slope(), lambda model: sweep_space.build("muon", model, {"lr": 0.01}), loop, seed=seed).loss)
    assert len(set(alone)) == 3
    assert score == pytest.approx(sum(alone) / 3, rel=1e-12)


def sweep_loop(sweep):
    from schatten.lab.fit import Loop

    return Loop(steps=sweep.steps, batch=sweep.batch, schedule=sweep.schedule, eval_every=sweep.eval_every)


def test_evaluations_of_the_first_seed_are_reported_and_no_others():
    seen = []
    Objective(dataclasses.replace(SMALL, seeds=2), Slope(), "")({"lr": 0.01}, lambda step, loss: seen.append(step))
    assert seen == [2, 4, 6]


def test_a_run_that_diverges_after_a_finite_evaluation_is_inf():
    seen = []
    score = Objective(SMALL, Slope(breaks=4), "")({"lr": 0.01}, lambda step, loss: seen.append(loss))
    assert len(seen) == 2 and all(map(math.isfinite, seen))
    assert score == math.inf
    found = fit(Slope(breaks=4), lambda model: sweep_space.build("muon", model, {"lr": 0.01}), sweep_loop(SMALL))
    assert found.diverged and found.loss == math.inf, "the last finite evaluation is not the loss of a diverged run"


def test_the_digits_task_learns():
    score = Objective.load(dataclasses.replace(SMALL, steps=40, width=32, batch=64))({"lr": 0.03}, lambda step, loss: None)
    # Guessing among ten digits costs log 10 = 2.3 nats.
    assert score < 1.5


def test_settings_reach_the_rule_and_the_adamw_beside_it():
    model = MLP((4, 4, 2), bias=True)
    params = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.7, "aux_lr": 0.005, "aux_eps": 1e-6, "aux_beta2": 0.9}
    groups = sweep_space.build("muon", model, params).param_groups
    spectral = next(g for g in groups if g["algorithm"] == "spectral")
    aux = next(g for g in groups if g["algorithm"] == "adamw" and g["params"])
    assert (spectral["lr"], spectral["weight_decay"], spectral["momentum"]) == (0.02, 0.3, 0.7)
    assert (aux["lr"], aux["eps"], aux["betas"]) == (0.005, 1e-6, (0.9, 0.9))


def test_a_beta_left_out_keeps_the_optimizers_own():
    own = sweep_space.build("adamw", MLP((4, 2)), {"beta2": 0.99}).param_groups[0]
    assert own["betas"] == (0.9, 0.99)
    assert own["lr"] == optimizers.default_lr("adamw")


@pytest.mark.parametrize("name", list(optimizers.known()))
def test_every_name_that_an_optimizer_lists_changes_it(name):
    """A setting that is read by nothing would be swept in vain."""
    default = sweep_space.build(name, MLP((4, 4, 2), bias=True), {}).param_groups
    for setting in sweep_space.known(name):
        changed = sweep_space.build(name, MLP((4, 4, 2), bias=True), {setting: 0.123}).param_groups
        assert numbers(changed) != numbers(default), setting


def numbers(groups):
    return [{k: v for k, v in g.items() if isinstance(v, (float, tuple)) and k != "params"} for g in groups if g["params"]]


def test_a_grid_has_every_point_once_in_an_order_of_its_seed():
    space = {"lr": (1.0, 2.0, 3.0), "weight_decay": (0.0, 0.1)}
    points = sweep_space.grid(space, 0)
    assert len({tuple(p.values()) for p in points}) == len(points) == 6
    assert points == sweep_space.grid(space, 0) != sweep_space.grid(space, 1)
    with pytest.raises(InputError, match="lr is a span"):
        sweep_space.grid({"lr": Span(1, 2)}, 0)


def result(slot, lr, loss, state="complete"):
    return Result(slot, {"lr": lr, "weight_decay": 0.1}, loss, state)


SPACE = {"lr": {"low": 1e-4, "high": 1.0, "log": True}, "weight_decay": [0.0, 0.1]}


def test_a_best_trial_at_the_edge_of_a_span_is_pointed_out():
    assert edges(result(0, 0.5, 1.0), SPACE) == ["lr"]
    assert edges(result(0, 0.1, 1.0), SPACE) == []
    assert "lr at an edge of what was tried" in verdict([result(0, 0.5, 1.0)], SPACE)


def test_without_a_finite_loss_the_verdict_says_why():
    assert "no trial ended with a finite loss" in verdict([result(0, 0.5, math.inf, "diverged")], SPACE)
    failed = Result(0, {}, math.inf, "failed", note="error: ArithmeticError")
    assert "every trial failed, the first: error: ArithmeticError" in verdict([failed], SPACE)


def test_pictures_mark_divergence_above_all_losses_and_cut_what_would_flatten_them():
    found = [result(0, 1e-3, 1.0), result(1, 1e-2, 0.5), result(2, 0.1, 0.7), result(3, 0.5, 1e9)]
    found += [result(4, 0.9, math.inf, "diverged"), result(5, 2e-4, 2.0, "pruned")]
    axes = sensitivity(found, SPACE, "lr", "loss").axes[0]
    marks = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert axes.get_xscale() == "log"
    assert max(marks["complete"]) == ceiling([1.0, 0.5, 0.7, 1e9, 2.0]) < 3
    assert min(marks["diverged (inf)"]) > max(marks["complete"])
    assert len(marks["pruned, at its last evaluation"]) == 1
    lines = parallel(found, SPACE, "loss").axes[0].lines
    assert len([line for line in lines if len(line.get_xdata()) == 3]) == 4, "complete trials alone"


def test_pictures_of_one_trial_or_equal_losses_can_be_drawn():
    for found in ([result(0, 0.1, 1.0)], [result(0, 0.1, 1.0), result(1, 0.2, 1.0)], [result(0, 0.1, math.inf, "diverged")]):
        sensitivity(found, SPACE, "lr", "loss").canvas.draw()
        parallel(found, SPACE, "loss").canvas.draw()
