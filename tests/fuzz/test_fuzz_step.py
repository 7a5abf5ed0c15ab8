"""Steps: whatever legal is drawn is accepted and keeps weights finite; whatever illegal is drawn is refused by name."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from tests.fuzz.invariants import CASES, Snapshot, assert_same, fuzz, refusal, step_and_check
from tests.fuzz.options import ILLEGAL, accepted, made, optimizer
from tests.fuzz.strategies import SMALL, Setup, gradients, setups, shapes
from tests.fuzz.tensors import DTYPES, REFUSED_DTYPES, Numbers, numbers

# Defaults of lr and a drawn decay may together be unstable, of which users are warned; three steps of it stay finite.
pytestmark = pytest.mark.filterwarnings("ignore:lr . weight_decay is:UserWarning")


def test_the_fuzz_runs_two_thousand_cases_in_ci():
    # Each test fails if it ran fewer than its share.
    assert sum(CASES.values()) >= 2000


@st.composite
def runs(draw):
    setup = draw(setups())
    return setup, draw(gradients(setup, draw(st.integers(1, 3))))


@fuzz("legal steps", run=runs())
def test_legal_optimizers_step_on_any_gradients_with_finite_weights_and_the_same_bits_twice(run):
    setup, steps = run
    twins = []
    for _ in range(2):
        opt = setup.build()
        for given in steps:
            step_and_check(opt, [None if n is None else n.make() for n in given])
        twins.append(opt)
    assert_same(*twins)


# Options that a group may have of its own.
OF_GROUPS = ("lr", "weight_decay", "rounding", "maximize", "momentum", "betas", "beta2", "state_dtype", "layout", "algorithm")


@st.composite
def spoilt_options(draw) -> tuple[Setup, str, str]:
    """An optimizer with one illegal option, the option and the place where it stands."""
    setup = draw(setups(SMALL))
    own = sorted(accepted(setup.preset) & set(ILLEGAL))
    key = draw(st.sampled_from(own))
    value = draw(st.sampled_from(ILLEGAL[key]))
    assume(value is not None or (setup.preset, key) not in {("SpectralSGD", "lr"), ("SpectralAdam", "lr")})  # their default
    where = draw(st.sampled_from(("constructor", "group", "added")))
    if where == "constructor" or key not in OF_GROUPS:
        return replace(setup, options={**setup.options, key: value}), key, "constructor"
    group = replace(setup.groups[0], options={**setup.groups[0].options, key: value})
    if where == "group":
        return replace(setup, groups=(group, *setup.groups[1:])), key, where
    return replace(setup, groups=(*setup.groups, group)), key, where


@fuzz("illegal options", case=spoilt_options())
def test_an_illegal_option_is_refused_by_its_name_wherever_it_stands(case):
    setup, key, where = case
    inner = setup.options[key] if key == "adamw" else None
    check_refused(setup, where == "added", [key, *(inner if isinstance(inner, dict) else ())])


def check_refused(setup: Setup, added: bool, words: list[str]) -> None:
    """The whole is refused; or its last group, when it is added to the rest, which then steps as if nothing had been."""
    tensors = setup.tensors()
    if not added:
        before = Snapshot(None, tensors)
        with refusal(*words):
            setup.build(tensors)
        before.assert_nothing_changed()
        return
    rest = replace(setup, groups=setup.groups[:-1])
    count = sum(len(group.params) for group in rest.groups)
    opt = rest.build(tensors[:count])
    last = setup.groups[-1]
    before = Snapshot(opt, tensors)
    known = set(opt.state)
    with refusal(*words):
        named = list(zip(setup.names()[count:], tensors[count:], strict=True))
        opt.add_param_group({"params": named, "algorithm": last.algorithm, **made(last.options)})
    before.assert_nothing_changed()
    assert set(opt.state) == known
    step_and_check(opt, [Numbers(tuple(p.shape), p.dtype).make() for p in tensors[:count]])


SPOILT = ("dtype", "sparse", "expanded", "no leaf", "twice", "no tensor", "no matrix")


@st.composite
def spoilt_parameters(draw) -> tuple[Setup, str, Numbers, bool]:
    setup = draw(setups(SMALL))
    how = draw(st.sampled_from(SPOILT))
    dtype = draw(st.sampled_from(REFUSED_DTYPES if how == "dtype" else DTYPES))
    shape = draw(shapes(0, 1) if how == "no matrix" else shapes(2, 2).filter(all))
    return setup, how, draw(numbers(shape, dtype, ("normal",))), draw(st.booleans())


@fuzz("illegal parameters", case=spoilt_parameters())
def test_a_parameter_that_cannot_be_trained_is_refused_by_its_name(case):
    setup, how, n, added = case
    spoilt = spoil(n, how)
    tensors = setup.tensors()
    groups = [{"params": [("odd.weight", t) for t in ([spoilt] * (1 + (how == "twice")))], "layout": "auto"}]
    kind = optimizer(setup.preset)
    if not added:
        with refusal("'odd.weight'", *(("tensors",) if how == "no tensor" else ())):
            kind(groups, **made(setup.options))
        return
    opt = setup.build(tensors)
    before = Snapshot(opt, tensors)
    with refusal("'odd.weight'", *(("tensors",) if how == "no tensor" else ())):
        opt.add_param_group(groups[0])
    before.assert_nothing_changed()
    assert set(opt.state) == set(tensors)
    step_and_check(opt, [Numbers(tuple(p.shape), p.dtype).make() for p in tensors])


def spoil(n: Numbers, how: str) -> Any:
    t = n.make()
    match how:
        case "sparse":
            return nn.Parameter(t.to_sparse())
        case "expanded":
            return nn.Parameter(t.new_ones(1, t.shape[1]).expand(max(2, t.shape[0]), -1))
        case "no leaf":
            return t.requires_grad_() * 2
        case "no tensor":
            return t.tolist()
    return nn.Parameter(t, requires_grad=t.is_floating_point() or t.is_complex())
