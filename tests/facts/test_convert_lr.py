"""A converted lr and decay make the same step under another scale, and keep the bound on the weights."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schatten import Muon, maps
from schatten.convert_lr import convert_lr, convert_weight_decay
from schatten.scale_names import ALIASES, NAMES
from schatten.scales import RMS, Scale
from schatten.solvers import svd
from tests.contracts.matrices import gaussian

SHAPES = [(40, 10), (10, 40), (16, 16), (1, 9)]

PAIRS = list(itertools.permutations(NAMES, 2))

NAME = st.sampled_from([*NAMES, *ALIASES, RMS(0.5)])

SHAPE = st.tuples(st.integers(1, 10**6), st.integers(1, 10**6))


def stepped(shape, scale, lr, decay, steps=3):
    W = torch.nn.Parameter(gaussian(*shape))
    opt = Muon([W], lr=lr, weight_decay=decay, scale=scale, solver=svd())
    for seed in range(steps):
        W.grad = gaussian(*shape, seed=seed + 1)
        opt.step()
    return W.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_converted_lr_and_decay_repeat_the_run(shape, before, after):
    lr, decay = 0.02, 0.3
    new_lr, new_decay = convert_lr(lr, before, after, shape), convert_weight_decay(decay, before, after, shape)
    expected = stepped(shape, before, lr, decay)
    # fp64: only the order of two products differs.
    assert (stepped(shape, after, new_lr, new_decay) - expected).abs().max() < 1e-12
    if Scale(before).factor(*shape) != Scale(after).factor(*shape):
        assert (stepped(shape, after, lr, decay) - expected).abs().max() > 1e-3, "this shape would not see a wrong lr"
        assert (stepped(shape, after, new_lr, decay) - expected).abs().max() > 1e-3, "nor a decay left as it was"


@given(lr=st.floats(1e-8, 10), decay=st.floats(1e-8, 10), before=NAME, after=NAME, shape=SHAPE)
def test_lr_times_factor_lr_times_decay_and_the_bound_stay(lr, decay, before, after, shape):
    before, after = (Scale(x) if isinstance(x, str) else x for x in (before, after))
    new_lr, new_decay = convert_lr(lr, before, after, shape), convert_weight_decay(decay, before, after, shape)
    old_c, new_c = before.factor(*shape), after.factor(*shape)
    assert new_lr * new_c == pytest.approx(lr * old_c, rel=1e-12)
    assert new_lr * new_decay == pytest.approx(lr * decay, rel=1e-12)
    assert new_c / new_decay == pytest.approx(old_c / decay, rel=1e-12)


@given(lr=st.floats(1e-8, 10), a=NAME, b=NAME, c=NAME, shape=SHAPE)
def test_conversions_compose_and_invert(lr, a, b, c, shape):
    direct = convert_lr(lr, a, c, shape)
    assert convert_lr(convert_lr(lr, a, b, shape), b, c, shape) == pytest.approx(direct, rel=1e-12)
    assert convert_lr(convert_lr(lr, a, b, shape), b, a, shape) == pytest.approx(lr, rel=1e-12)


def test_the_defaults_go_from_keller_to_adamw():
    # By hand: 0.02 sqrt(3072 / 768) / (0.2 sqrt(3072)).
    assert convert_lr(0.02, shape=(3072, 768)) == pytest.approx(0.02 * 2 / (0.2 * math.sqrt(3072)), rel=1e-12)
    assert convert_lr(0.02, shape=(768, 3072)) == pytest.approx(0.02 / (0.2 * math.sqrt(3072)), rel=1e-12)


def test_no_shape_is_needed_where_the_ratio_is_the_same_for_all():
    assert convert_lr(3e-4, "moonlight", "match_rms_adamw") == 3e-4
    assert convert_lr(0.02, "original", "keller") == 0.02
    # Keras' rms_rate, optax' consistent_rms, Emerging-Optimizers' extra_scale_factor: r sqrt(max) is RMS(r).
    assert convert_lr(1e-3, RMS(1.0), "adamw-rms") == pytest.approx(5e-3, rel=1e-12)
    assert convert_weight_decay(0.1, RMS(1.0), "adamw-rms") == pytest.approx(0.02, rel=1e-12)
    assert convert_lr(1e-3, RMS(0.18), RMS(0.3)) == pytest.approx(6e-4, rel=1e-12)
    for shape in SHAPES:
        assert convert_lr(1e-3, RMS(1.0), "adamw-rms", shape) == convert_lr(1e-3, RMS(1.0), "adamw-rms")


@pytest.mark.parametrize(("before", "after"), [*PAIRS, ("keller", RMS(0.2)), (RMS(0.2), "mup")])
def test_otherwise_the_shape_is_asked_for(before, after):
    for convert in (convert_lr, convert_weight_decay):
        with pytest.raises(ValueError, match=r"depends on the matrix: pass shape=\(fan_out, fan_in\)"):
            convert(0.02, before, after)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 5), (5, 0), (-1, 2), (2.0, 3), "ab"], ids=str)
def test_a_shape_that_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="shape must be"):
        convert_lr(0.02, "keller", "mup", shape)


@pytest.mark.parametrize("value", [-1e-3, math.inf, math.nan, "0.02", True, None], ids=repr)
def test_a_number_that_is_no_learning_rate_is_refused(value):
    with pytest.raises(ValueError, match=r"^lr must be a finite number >= 0"):
        convert_lr(value, "keller", "mup", (3, 4))
    with pytest.raises(ValueError, match=r"^weight_decay must be a finite number >= 0"):
        convert_weight_decay(value, "keller", "mup", (3, 4))


def test_a_name_with_two_meanings_or_none_is_refused():
    with pytest.raises(ValueError, match="'adamw-rms' with 5 times the lr"):
        convert_lr(1e-3, "spectral", "adamw-rms")
    with pytest.raises(ValueError, match="scale must be one of"):
        convert_lr(1e-3, "adamw-rms", "adam", (3, 4))
    for wrong in (RMS, maps.Nuclear(), 0.2, None):
        with pytest.raises(TypeError, match=r"to must be a scale's name or a factor"):
            convert_lr(1e-3, "keller", wrong, (3, 4))


def update_rms(opt, W, gradients):
    total = 0.0
    for G in gradients:
        before = W.detach().clone()
        W.grad = G
        opt.step()
        total += float((W.detach() - before).square().mean().sqrt())
    return total / len(gradients)


def test_an_adamw_lr_makes_updates_of_about_adamw_s_size():
    # On noise AdamW's update has RMS sqrt((1 - beta1) / (1 + beta1)) lr = 0.229 lr; 5 % covers the first, corrected steps.
    noise = [gaussian(48, 64, seed=seed).float() for seed in range(60)]
    W, V = torch.nn.Parameter(torch.zeros(48, 64)), torch.nn.Parameter(torch.zeros(48, 64))
    adamw = torch.optim.AdamW([W], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    update_rms(adamw, W, noise)
    theirs = update_rms(adamw, W, noise)
    ours = update_rms(Muon([V], lr=1.0, weight_decay=0.0, solver=svd()), V, noise[:5])
    assert theirs == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.05)
    assert ours == pytest.approx(0.2, rel=1e-4)
    assert 0.8 < ours / theirs < 1.0
