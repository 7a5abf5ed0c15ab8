"""Checkpoints: a good one resumes to the same bits, one that was edited anywhere is refused by name or can be trained on."""

import copy
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from tests.fuzz.invariants import Snapshot, assert_named, assert_same, fuzz, params_of, step_and_check
from tests.fuzz.strategies import PRESETS, SMALL, Setup, setups
from tests.fuzz.tensors import Numbers

pytestmark = pytest.mark.filterwarnings("ignore:lr . weight_decay is:UserWarning")

Path: TypeAlias = "tuple[Any, ...]"


def trained(setup: Setup, steps: int) -> Any:
    opt = setup.build()
    for seed in range(steps):
        step(opt, seed)
    return opt


def step(opt: Any, seed: int) -> None:
    step_and_check(opt, [Numbers(tuple(p.shape), p.dtype, "normal", "dense", seed).make() for p in params_of(opt)])


def with_weights_of(setup: Setup, other: Any) -> Any:
    opt = setup.build()
    with torch.no_grad():
        for p, q in zip(params_of(opt), params_of(other), strict=True):
            p.copy_(q)
    return opt


@fuzz("resumed checkpoints", setup=setups(SMALL), steps=st.integers(0, 2))
def test_a_checkpoint_resumes_to_the_same_bits_from_a_file_of_plain_values(setup: Setup, steps: int):
    opt = trained(setup, steps)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = with_weights_of(setup, opt)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(opt, resumed)
    for one in (opt, resumed):
        step(one, 7)
    assert_same(opt, resumed)


# -- edits -----------------------------------------------------------------------------------------------------------------

EDITS = ("delete", "rename", "replace", "poison", "reshape", "retype", "negate", "duplicate", "swap")

VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "2": 2,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "10 ** 400": 10**400,
    "a word": "spectral",
    "no word": "",
    "bytes": b"1",
    "list": [],
    "tuple": (0.5, 0.5),
    "dict": {},
    "nested": {"lr": {"lr": [0.1]}},
    "set": {1},
    "type": float,
    "number as a tensor": torch.tensor(0.5),
    "nan as a tensor": torch.tensor(math.nan),
    "empty tensor": torch.zeros(0),
    "another tensor": torch.zeros(7, 2),
    "complex tensor": torch.zeros((), dtype=torch.complex64),
    "bool tensor": torch.zeros((), dtype=torch.bool),
    "meta tensor": torch.zeros(3, device="meta"),
    "sparse tensor": torch.eye(3).to_sparse(),
}

DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """The place of every entry at any depth."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, entry in inside:
        yield (*at, key)
        yield from paths(entry, (*at, key))


def at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def edited(state_dict: dict[str, Any], path: Path, how: str, value: Any, dtype: torch.dtype, other: Path) -> dict[str, Any]:
    """A copy with the entry at `path` edited; unchanged where there is nothing of that kind to edit."""
    new = copy.deepcopy(state_dict)
    old = at(new, path)
    match how:
        case "rename":
            if isinstance(at(new, path[:-1]), dict):
                entries = at(new, path[:-1])
                entries[f"{path[-1]}x" if isinstance(path[-1], str) else 77] = entries.pop(path[-1])
            return new
        case "delete":
            return _with(new, path, None, delete=True)
        case "replace":
            return _with(new, path, value)
        case "swap":
            theirs = at(new, other)
            if path[: len(other)] == other or other[: len(path)] == path:
                return new
            return _with(_with(new, path, theirs), other, old)
        case "duplicate" if isinstance(old, list):
            return _with(new, path, old + old[-1:])
    if not isinstance(old, torch.Tensor):
        return new
    match how:
        case "poison" if old.is_floating_point() and old.numel():
            old.view(-1)[-1] = math.nan
        case "reshape":
            return _with(new, path, torch.zeros((*old.shape, 2), dtype=old.dtype))
        case "retype":
            return _with(new, path, old.to(dtype))
        case "negate" if old.is_floating_point():
            return _with(new, path, -old - 1)
    return new


def _with(root: Any, path: Path, value: Any, delete: bool = False) -> Any:
    """`root` with another entry at `path`; tuples on the way are made anew."""
    key, *rest = path
    items = root if isinstance(root, dict) else list(root)
    if rest:
        items[key] = _with(root[key], tuple(rest), value, delete)
    elif delete:
        del items[key]
    else:
        items[key] = value
    return tuple(items) if isinstance(root, tuple) else items


def same(a: Any, b: Any) -> bool:
    """Equal entries at every depth; nan is nan."""
    if isinstance(a, dict) or isinstance(b, dict):
        return isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) or isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b) and type(a) is type(b)


def words_for(path: Path, setup: Setup) -> list[str]:
    """What the refusal of an edit at `path` must name: the parameter whose state it is, the group's option or its group."""
    names = setup.names()
    kind, *rest = path
    if not rest:
        return [str(kind), "state_dict", *names]
    place, *inside = rest
    if kind == "state":
        # Its number may have become another's, or nobody's.
        own = [names[place]] if isinstance(place, int) and place < len(names) else names
        return own if inside else [*own, str(place)]
    if not inside or inside[0] in ("params", "param_names"):
        return [f"group {place}", "groups", "group", "param_names", *names]
    # "The checkpoint trains it by 'x', this optimizer by 'y'."
    return [str(inside[0]), *(["trains it by"] if inside[0] == "algorithm" else [])]


def assert_refused_or_usable(setup: Setup, steps: int, broken: Any, words: list[str], must_refuse: bool) -> None:
    good = trained(setup, steps)
    opt = with_weights_of(setup, good)
    given = copy.deepcopy(broken)
    before = Snapshot(opt, params_of(opt))
    try:
        opt.load_state_dict(broken)
    except Exception as error:
        assert type(error) is ValueError, error
        assert_named(error, words)
        before.assert_nothing_changed()
        opt.load_state_dict(good.state_dict())
        assert_same(good, opt)
        for one in (good, opt):
            step(one, 7)
        assert_same(good, opt)
    else:
        assert not must_refuse, "accepted"
        before.assert_weights_kept()
        step(opt, 7)
    assert same(broken, given)


@st.composite
def edits(draw):
    setup, steps = draw(setups(SMALL)), draw(st.integers(0, 1))
    numbers = st.integers(0, 10**4)
    how, value, dtype = (draw(st.sampled_from(choice)) for choice in (EDITS, sorted(VALUES), DTYPES))
    return setup, steps, how, value, dtype, draw(numbers), draw(numbers)


NEEDED = {("lr",), ("weight_decay",), ("schema",), ("algorithm",), ("params",), ("step",)}


@fuzz("edited checkpoints", case=edits())
def test_a_checkpoint_edited_at_any_depth_is_refused_by_name_or_trains_on(case):
    setup, steps, how, value, dtype, *numbers = case
    saved = trained(setup, steps).state_dict()
    places = list(paths(saved))
    path, other = (places[number % len(places)] for number in numbers)
    broken = edited(saved, path, how, VALUES[value], dtype, other)
    assume(not same(broken, saved))
    words = words_for(path, setup) + (words_for(other, setup) if how == "swap" else [])
    if path[0] == "state":
        lost = how in ("delete", "rename", "poison", "reshape")
        must_refuse = lost or (how == "replace" and not isinstance(VALUES[value], torch.Tensor))
    else:
        must_refuse = how == "delete" and (len(path) <= 2 or path[2:] in NEEDED)
    assert_refused_or_usable(setup, steps, broken, words, must_refuse)


# A rule of one's own needs its numbers, and JaguarMuon trains nothing by AdamW.
OTHERS = sorted(set(PRESETS) - {"SpectralOptimizer", "JaguarMuon"})


@fuzz("other checkpoints", setup=setups(SMALL), preset=st.sampled_from(OTHERS), steps=st.integers(0, 1))
def test_a_checkpoint_of_another_preset_is_refused_unless_its_rules_are_the_same(setup: Setup, preset: str, steps: int):
    assume(preset != setup.preset != "JaguarMuon")
    groups = tuple(
        replace(g, options={"layout": g.options["layout"]} if g.algorithm == "spectral" else {}) for g in setup.groups
    )
    theirs = trained(Setup(preset, groups), steps).state_dict()
    ours = replace(setup, groups=groups)
    rules = [[group.get("rule") for group in one["param_groups"]] for one in (theirs, ours.build().state_dict())]
    assert_refused_or_usable(ours, steps, theirs, ["rule", "state_dtype", *ours.names()], rules[0] != rules[1])
