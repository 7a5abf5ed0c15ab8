"""Wrong rates, factors and decays: each is caught by the runs of `test_constraint_rates.py`, so that those can fail."""

import itertools

import pytest
import torch

import schatten
from schatten.diagnostics.constraint import Constraint, ball_violation
from schatten.diagnostics.core import Block
from schatten.maps import Nuclear
from tests.facts.constraint_runs import DECAY, FACTOR, GRADIENTS, LRS, SHAPE, START, kept, run

PRECISION = 1e-10


def caught(violations, lrs, decay):
    steps = zip(violations[:-1], violations[1:], LRS[lrs](), strict=True)
    return any(after > kept(lr, decay) * before + PRECISION for before, after, lr in steps)


def test_implicit_decay_at_the_rate_of_explicit_decay_is_caught():
    """The paper's equation 7 for its equation 3."""
    assert caught(run("outward", "constant", "implicit"), "constant", "explicit")
    assert not caught(run("outward", "constant", "explicit"), "constant", "implicit")  # it is faster


class Mistaken:
    """A matrix that a hand-written Muon steps, its mistake by name."""

    def __init__(self, mistake):
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        self.W, self.mistake, self.generator = W * START / torch.linalg.matrix_norm(W, ord=2), mistake, generator

    def step(self, lr):
        W, K = self.W, Nuclear(schatten.solvers.svd())
        D = K.grad(GRADIENTS["outward"](W, self.generator))
        self.W = {
            "none": lambda: (1 - lr * DECAY) * W - lr * FACTOR * D,
            "twice the factor": lambda: (1 - lr * DECAY) * W - lr * 2 * FACTOR * D,
            "decay times lr twice": lambda: (1 - lr**2 * DECAY) * W - lr * FACTOR * D,
            "decay in the gradient": lambda: W - lr * FACTOR * K.grad(DECAY * W - W),
            "no decay": lambda: W - lr * FACTOR * D,
        }[self.mistake]()


MISTAKES = ["twice the factor", "decay times lr twice", "decay in the gradient", "no decay"]


def records(mistake, every=40):
    """V_B after each step, and what the quantity logs each `every` steps, under gradients that push outward."""
    stepped, violations, logged = Mistaken(mistake), [], []
    rule = schatten.Rule(map=Nuclear(), scale=schatten.scales.Scale("keller"))
    for t, lr in enumerate(LRS["constant"]()):
        violations.append(ball_violation(stepped.W, DECAY, FACTOR).item())
        if t % every == 0:
            block = Block("W", rule, {"lr": lr, "weight_decay": DECAY}, stepped.W.unsqueeze(0))
            logged.append({key: float(value) for key, value in Constraint()(block).items()})
        stepped.step(lr)
    return [*violations, ball_violation(stepped.W, DECAY, FACTOR).item()], logged


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_step_breaks_the_rate(mistake):
    assert caught(records(mistake)[0], "constant", "explicit")
    assert not caught(records("none")[0], "constant", "explicit")


@pytest.mark.parametrize("mistake", ["decay times lr twice", "decay in the gradient", "no decay"])
def test_a_step_that_takes_a_weight_out_of_the_ball_is_called_out(mistake):
    alarm, (_, logged) = Constraint().alarm, records(mistake)
    message = alarm(logged[0], logged[1])
    assert message is not None and "shape factor" in message and "lr * weight_decay" in message
    _, right = records("none")
    assert all(alarm(before, now) is None for before, now in itertools.pairwise(right))
