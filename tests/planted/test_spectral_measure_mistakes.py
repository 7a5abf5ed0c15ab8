"""Broken measures of gradients, noise and attention: each mistake is caught by the laws named beside it."""

import math
from functools import partial
from importlib import import_module

import pytest
import torch

from schatten.diagnostics.core import Estimate
from schatten.diagnostics.noise_scale import NoiseScale, noise_scale
from schatten.diagnostics.singular_values import singular_values
from tests.contracts import measure_laws as laws
from tests.contracts import noise_draws

# The functions have their files' names.
module = import_module("schatten.diagnostics.noise_scale")


def squared(X):
    """The ratio without the root: ||G||_* / ||G||_F."""
    s = singular_values(X)
    return s.sum(-1) / s.norm(dim=-1).clamp(min=1e-300)


def unnormalised(X):
    """||G||_*^2 without the division."""
    return singular_values(X).sum(-1).square()


def of_gram(X):
    """Ratio from X X^T whatever the shape is, so that it is transposed wrongly."""
    s = torch.linalg.eigvalsh(X @ X.mT).clamp(min=0).sqrt()
    return s.sum(-1) ** 2 / s.square().sum(-1) * X.shape[-2] / X.shape[-1]


def with_eps(X):
    """An absolute epsilon in the denominator."""
    s = singular_values(X)
    return s.square().sum(-1) / (s[..., 0].square() + 1e-8)


def entropy_of_squares(X):
    """exp of the entropy of s^2, another effective rank: not above the nuclear ratio."""
    p = singular_values(X).square()
    return torch.special.entr(p / p.sum(-1, keepdim=True)).sum(-1).exp()


def raising(X):
    """LAPACK's exception for what is not finite."""
    return torch.linalg.svdvals(X.double()).sum(-1)


def whole_batch(X):
    """One number for the batch."""
    s = singular_values(X)
    return (s.sum() ** 2 / s.square().sum()).expand(X.shape[:-2])


def undefined_zero(X):
    s = singular_values(X)
    return s.sum(-1).square() / s.square().sum(-1)


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        (squared, laws.lies_between_one_and_the_rank),
        (unnormalised, laws.scale_is_not_seen),
        (unnormalised, laws.lies_between_one_and_the_rank),
        (of_gram, laws.rotations_and_transposition_are_not_seen),
        (with_eps, laws.scale_is_not_seen),
        (raising, laws.non_finite_stays_in_its_matrix),
        (whole_batch, laws.any_batch_will_do),
        (whole_batch, laws.non_finite_stays_in_its_matrix),
        (undefined_zero, partial(laws.zero_has, value=0.0)),
    ],
)
def test_a_mistake_in_a_rank_breaks_a_law(mistake, law):
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):
        law(mistake)


def test_the_effective_rank_of_squares_is_told_apart_by_the_order_of_the_ranks():
    from schatten.diagnostics.effective_ranks import nuclear_ratio

    X = laws.matrix(9, 6)
    assert float(entropy_of_squares(X)) < float(nuclear_ratio(X))


def broken(noise_and_signal):
    """`noise_scale` with another way to the two parts."""

    def estimate(gradients, batch_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_noise_and_signal", noise_and_signal)
            return noise_scale(gradients, batch_size)

    return estimate


def biased_signal(trace, total, n, batch_size):
    """|mean|^2, to which the noise of the mean adds."""
    return batch_size * (trace - total / n) / (n - 1), total / n**2


def biased_noise(trace, total, n, batch_size):
    """The mean of squares about the mean, divided by n."""
    return batch_size * (trace - total / n) / n, (total - trace) / (n * (n - 1))


def of_micro_batches(trace, total, n, batch_size):
    """batch_size forgotten."""
    return (trace - total / n) / (n - 1), (total - trace) / (n * (n - 1))


@pytest.mark.parametrize("mistake", [biased_signal, biased_noise, of_micro_batches])
def test_a_biased_part_of_the_noise_scale_is_seen(mistake):
    with pytest.raises(AssertionError):
        noise_draws.parts_are_unbiased(broken(mistake))


def rescaled(factor):
    """Right values with errors `factor` times as large."""

    def estimate(gradients, batch_size):
        found = noise_scale(gradients, batch_size)
        return NoiseScale(*(Estimate(one.value, one.error * factor) for one in found))

    return estimate


@pytest.mark.parametrize("factor", [0.7, 2.0, 1 / math.sqrt(12), math.sqrt(12)])
def test_error_bars_that_are_too_short_or_too_long_are_seen(factor):
    with pytest.raises(AssertionError):
        noise_draws.errors_hold(rescaled(factor))
