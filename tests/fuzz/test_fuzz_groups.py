"""Edits between steps: of groups, parameters, gradients and state. The next step takes them or refuses them by name, whole."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

import schatten
from schatten import scales
from tests.fuzz.invariants import Snapshot, assert_named, fuzz, params_of, same_bits, step_and_check
from tests.fuzz.options import ILLEGAL, LEGAL, made
from tests.fuzz.strategies import ANY_LAYOUT, SMALL, Group, Setup, fitting, setups, shapes
from tests.fuzz.tensors import DTYPES, ORDINARY, Numbers, numbers

pytestmark = pytest.mark.filterwarnings("ignore:lr . weight_decay is:UserWarning")

# What becomes of the next step.
TAKEN, REFUSED, EITHER = "taken", "refused", "either"

# Every step reads these, so that an illegal value may not pass.
NUMBERS = ("lr", "weight_decay", "rounding", "maximize")


@dataclass(frozen=True)
class Edit:
    """A change of one group, parameter `i` of it, or of the optimizer; and what the next step must make of it."""

    what: str
    group: int = 0
    i: int = 0
    key: str = ""
    value: Any = None
    outcome: str = EITHER


@st.composite
def edits(draw, setup: Setup) -> Edit:
    g = draw(st.integers(0, len(setup.groups) - 1))
    group = setup.groups[g]
    i = draw(st.integers(0, len(group.params) - 1))
    own = group.params[i]
    spectral = group.algorithm == "spectral"

    def number(outcome: str, values: dict[str, tuple[Any, ...]]) -> Edit:
        key = draw(st.sampled_from(NUMBERS if spectral else (*NUMBERS, "betas", "eps")))
        assume((setup.preset, key) not in {("Hyperball", "weight_decay"), ("Scion", "weight_decay")})
        if outcome == TAKEN and key == "rounding":
            assume("kahan" not in (group.options.get(key), setup.options.get(key)))
            return Edit("set", g, i, key, draw(st.sampled_from(("stochastic", "nearest"))), outcome)
        return Edit("set", g, i, key, draw(st.sampled_from(values[key])), outcome)

    match draw(st.sampled_from(KINDS)):
        case "legal":
            return number(TAKEN, LEGAL)
        case "illegal":
            return number(REFUSED, ILLEGAL)
        case "momentum" if spectral:
            return Edit("set", g, i, "momentum", draw(st.sampled_from((*LEGAL["momentum"], *ILLEGAL["momentum"]))))
        case "algorithm":
            return Edit("set", g, i, "algorithm", draw(st.sampled_from(("spectral", "adamw", "sgd", None))))
        case "layout" if spectral:
            values = st.one_of(ANY_LAYOUT, st.sampled_from(ILLEGAL["layout"]))
            return Edit("set", g, i, "layout", draw(values))
        case "option":
            key = draw(st.sampled_from(OF_STATE_AND_RULE))
            values = (*LEGAL.get(key, ()), *ILLEGAL.get(key, ()), 3, schatten.Rule(scale=scales.Scale("none")))
            return Edit("set", g, i, key, draw(st.sampled_from(values)))
        case "delete":
            return Edit("delete", g, i, draw(st.sampled_from(KEYS)))
        case "own key":
            return Edit("set", g, i, "note", draw(st.sampled_from((object, None, "x", math.nan))), TAKEN)
        case "parameter":
            shape = draw(st.one_of(st.just(own.shape), shapes()))
            new = draw(numbers(shape, draw(st.sampled_from(DTYPES)), ("normal",)))
            return Edit(draw(st.sampled_from(("replace", "append", "data"))), g, i, value=new)
        case "dtype":
            return Edit("data", g, i, value=Numbers(own.shape, draw(st.sampled_from(DTYPES)), "normal"))
        case "remove":
            return Edit("remove", g, i, outcome=TAKEN)
        case "gradient" if setup.preset != "JaguarMuon":  # which makes its own
            how = draw(st.sampled_from(("none", "sparse", "dtype", "shape")))
            return Edit(f"grad {how}", g, i, value=draw(st.sampled_from(GRAD_DTYPES)), outcome=OF_GRADIENTS[how])
        case "state":
            return Edit(draw(st.sampled_from(("clear state", "drop state"))), g, i)
    return Edit("none", outcome=TAKEN)


OF_STATE_AND_RULE = ("state_dtype", "scale", "decay", "solver", "nesterov", "form", "step", "rounding", "rule")
KINDS = (
    "legal",
    "illegal",
    "momentum",
    "algorithm",
    "layout",
    "option",
    "delete",
    "own key",
    "parameter",
    "dtype",
    "remove",
    "gradient",
    "state",
)
KEYS = (
    "params",
    "param_names",
    "algorithm",
    "lr",
    "weight_decay",
    "rounding",
    "maximize",
    "state_dtype",
    "layout",
    "step",
    "momentum",
    "betas",
    "beta2",
    "eps",
    "rule",
    "scale",
    "solver",
    "decay",
    "form",
    "nesterov",
)
GRAD_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int32)
OF_GRADIENTS = {"none": TAKEN, "sparse": REFUSED, "dtype": EITHER, "shape": REFUSED}


class Edited:
    """Apply an edit to an optimizer, and take it back."""

    def __init__(self, opt: Any, edit: Edit) -> None:
        self.opt, self.edit = opt, edit
        self.groups = [{k: list(v) if k == "params" else v for k, v in group.items()} for group in opt.param_groups]
        self.params = params_of(opt)
        self.data = [p.data for p in self.params]
        self.state = {p: dict(opt.state[p]) for p in self.params}
        self.given: dict[torch.Tensor, torch.Tensor | None] = {}

    def apply(self) -> None:
        opt, edit = self.opt, self.edit
        group = opt.param_groups[edit.group]
        params, names = group["params"], group["param_names"]
        p = params[edit.i]
        match edit.what:
            case "set":
                group[edit.key] = made(edit.value)
            case "delete":
                assume(edit.key in group)
                del group[edit.key]
            case "replace":
                params[edit.i] = nn.Parameter(edit.value.make())
            case "append":
                params.append(nn.Parameter(edit.value.make()))
            case "data":
                p.data = edit.value.make()
            case "remove":
                group["params"], group["param_names"] = params[: edit.i], names[: edit.i]
            case "clear state":
                opt.state.clear()
            case "drop state":
                del opt.state[p]
            case "grad none":
                self.given[p] = None
            case "grad sparse":
                self.given[p] = torch.ones_like(p).to_sparse() if p.ndim else None
                assume(p.ndim)
            case "grad dtype":
                p.grad = None
                p.grad_dtype = None
                self.given[p] = torch.ones(p.shape, dtype=edit.value)
            case "grad shape":
                assume(p.numel())
                p.grad = self.given[p] = torch.ones_like(p)
                p.data = torch.ones((*p.shape, 2), dtype=p.dtype)

    def take_back(self) -> None:
        for group, kept in zip(self.opt.param_groups, self.groups, strict=True):
            group.clear()
            group.update({k: list(v) if k == "params" else v for k, v in kept.items()})
        for p, data in zip(self.params, self.data, strict=True):
            p.grad = None
            p.data = data
            self.opt.state[p] = dict(self.state[p])


@st.composite
def edited(draw):
    setup = draw(setups(SMALL))
    return setup, draw(edits(setup)), draw(st.integers(0, 1)), draw(st.sampled_from(ORDINARY))


@fuzz("edits", case=edited())
def test_the_step_after_an_edit_succeeds_or_is_refused_by_name_with_nothing_changed(case):
    setup, edit, steps, values = case
    opt = setup.build()
    for seed in range(steps):
        step_and_check(opt, usual(opt, seed))
    change = Edited(opt, edit)
    change.apply()
    words = [*(name for name in setup.names()), "params", "state", *KEYS, edit.key or "params"]
    # A step whose params or names are gone has no parameters that could be looked at.
    params = [p for group in opt.param_groups for p in group.get("params", []) if isinstance(p, torch.Tensor)]
    gradients = [change.given.get(p, gradient(p, values, 5)) for p in params]
    before = Snapshot(opt, change.params)
    try:
        if all("params" in group for group in opt.param_groups):
            step_and_check(opt, gradients)
        else:
            opt.step()
        assert edit.outcome != REFUSED, f"{edit} was taken"
    except AssertionError:
        raise
    except Exception as error:
        assert edit.outcome != TAKEN, f"{edit} was refused: {error}"
        assert_named(error, words)
        before.assert_weights_kept()
        before.assert_state_kept()
        change.take_back()
    else:
        return
    # As if nothing had been: the same bits as a twin that was never edited.
    twin = setup.build()
    for seed in range(steps):
        step_and_check(twin, usual(twin, seed))
    for one in (opt, twin):
        step_and_check(one, usual(one, 7))
    assert all(same_bits(p, q) for p, q in zip(params_of(opt), params_of(twin), strict=True))


def usual(opt: Any, seed: int) -> list[torch.Tensor]:
    return [gradient(p, "normal", seed) for p in params_of(opt)]


def gradient(p: torch.Tensor, values: str, seed: int) -> torch.Tensor:
    return Numbers(tuple(p.shape), p.dtype, values, "dense", seed).make()


@st.composite
def added(draw):
    setup = draw(setups(SMALL))
    read, dtype = draw(fitting()), draw(st.sampled_from(DTYPES))
    params = tuple(draw(numbers(shape, dtype, SMALL)) for shape in read.shapes)
    return setup, Group(params, "spectral", {"layout": read.layout}), draw(st.integers(0, 2))


@fuzz("added groups", case=added())
def test_a_group_added_between_steps_trains_from_then_on_and_leaves_the_others_as_they_were(case):
    setup, late, steps = case
    opt = setup.build()
    for seed in range(steps):
        step_and_check(opt, usual(opt, seed))
    before = Snapshot(opt, params_of(opt))
    params = [(f"late.{i}", nn.Parameter(n.make())) for i, n in enumerate(late.params)]
    opt.add_param_group({"params": params, **late.options})
    before.assert_weights_kept()
    assert all(p in opt.state for _, p in params)
    for seed in range(2):
        step_and_check(opt, usual(opt, seed))
    opt.metrics()
