"""Wrong Lyapunov functions and wrong steps: each is caught by the problems of `test_lyapunov.py`, so that those can fail."""

import functools
from importlib import import_module

import pytest
import torch

from schatten.diagnostics.fenchel_young import fenchel_young
from schatten.diagnostics.lyapunov import lyapunov, lyapunov_change_bound, lyapunov_constant
from tests.facts.lyapunov_problems import ROUNDING, problems, slacks

# The functions have their files' names.
module = import_module("schatten.diagnostics.lyapunov")

FOURS = 34


def caught(**options):
    """Whether a problem violates the inequality by much more than rounding."""
    return any(min(slacks(four, **options)) < -1e4 * ROUNDING for four in problems(FOURS))


def with_constant(wrong):
    """The function and its bound with C by `wrong` of the right one."""

    def of(function):
        @functools.wraps(function)
        def mistaken(*args, **options):
            right = module.lyapunov_constant
            module.lyapunov_constant = lambda *a, **o: wrong(right(*a, **o), *a)
            try:
                return function(*args, **options)
            finally:
                module.lyapunov_constant = right

        return mistaken

    return {"value": of(lyapunov), "bound": of(lyapunov_change_bound)}


def papers_sign(K, W, M, loss, *numbers, **options):
    """<lambda X, M> subtracted, as where M averages the negative gradient, with the library's M."""
    return lyapunov(K, W, -M, loss, *numbers, **options)


def without_regulariser(K, W, M, loss, lr, weight_decay, betas, factor, **options):
    """V_K without (1/lambda) K*(lambda W), which only maps with a norm for K do not have."""
    conjugate = fenchel_young(K, W, M, weight_decay, factor).conjugate
    return lyapunov(K, W, M, loss, lr, weight_decay, betas, factor, **options) - conjugate / weight_decay


def without_factor(K, W, M, loss, lr, weight_decay, betas, factor, **options):
    return lyapunov(K, W, M, loss, lr, weight_decay, betas, 1.0, **options)


def at_half_smoothness(*args, **options):
    bound = lyapunov_change_bound(*args, **options)
    return bound._replace(curvature=bound.curvature / 2)


def without_curvature(*args, **options):
    bound = lyapunov_change_bound(*args, **options)
    return bound._replace(curvature=torch.zeros_like(bound.curvature))


def at_twice_the_residual(*args, **options):
    bound = lyapunov_change_bound(*args, **options)
    return bound._replace(residual=2 * bound.residual)


def at_twice_the_monotone_term(*args, **options):
    bound = lyapunov_change_bound(*args, **options)
    return bound._replace(monotone=2 * bound.monotone)


MISTAKES = {
    "C twice": with_constant(lambda C, *a: 2 * C),
    "C half": with_constant(lambda C, *a: C / 2),
    "C without decay": with_constant(lambda C, lr, decay, betas, **o: lyapunov_constant(lr, 0.0, betas)),
    "C with the betas exchanged": with_constant(
        lambda C, lr, decay, betas, **o: lr * betas[1] / ((1 - betas[0]) + lr * decay * (1 - betas[1]))
    ),
    "the paper's sign": {"value": papers_sign},
    "no regulariser": {"value": without_regulariser},
    "no factor": {"value": without_factor},
    "L half": {"bound": at_half_smoothness},
    "no curvature": {"bound": without_curvature},
    "residual twice": {"bound": at_twice_the_residual},
    "monotone term twice": {"bound": at_twice_the_monotone_term},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_function_or_its_bound_is_caught(name):
    assert caught(**MISTAKES[name])


@pytest.mark.parametrize("form", ["implicit", "explicit"])
def test_the_other_form_of_decay_than_the_formula_says_is_caught(form):
    others = (four for four in problems(FOURS) if four.decay != form)
    assert any(min(slacks(four, decay=form)) < -1e4 * ROUNDING for four in others)
