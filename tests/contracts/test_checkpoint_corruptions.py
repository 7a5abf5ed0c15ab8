"""A checkpoint that was damaged or edited is refused by ValueError before anything changes, whatever the damage."""

import copy
import random

import pytest
import torch

from tests.contracts.test_checkpoint_refusals import optimizer, refusal, trained

NAN, INF = float("nan"), float("inf")

# (group, key, value): what no step could use.
NUMBERS = [
    (0, "lr", NAN),
    (0, "lr", INF),
    (0, "lr", -0.1),
    (0, "lr", True),
    (0, "lr", "0.1"),
    (0, "lr", None),
    (0, "lr", [0.1]),
    (0, "lr", 10**400),
    (0, "lr", torch.tensor([0.1, 0.2])),
    (0, "lr", torch.tensor(NAN)),
    (0, "lr", torch.tensor(0.1, device="meta")),
    (0, "lr", torch.tensor(1j)),
    (0, "weight_decay", -INF),
    (0, "momentum", 1.0),
    (0, "momentum", -0.1),
    (0, "momentum", NAN),
    (0, "momentum", {}),
    (0, "momentum", (0.9, 0.9)),
    (0, "rounding", "up"),
    (0, "rounding", 3),
    (0, "maximize", "no"),
    (0, "maximize", None),
    (0, "step", -1),
    (0, "step", 1.5),
    (0, "step", True),
    (0, "step", "3"),
    (0, "layout", None),
    (0, "layout", "cube"),
    (0, "layout", 4),
    (0, "state_dtype", 8),
    (0, "rule", None),
    (0, "rule", 1),
    (0, "schema", "1"),
    (0, "schema", True),
    (0, "schema", None),
    (0, "algorithm", None),
    (0, "algorithm", ["spectral"]),
    (0, "params", None),
    (0, "params", "01"),
    (0, "params", [0, [1]]),
    (0, "params", [0, 0]),
    (0, "params", [0, 2]),
    (0, "params", [0, 7]),
    (0, "initial_lr", NAN),
    (1, "betas", (0.9,)),
    (1, "betas", 0.9),
    (1, "betas", (0.9, 1.0)),
    (1, "betas", (0.9, NAN)),
    (1, "betas", ("a", "b")),
    (1, "betas", None),
    (1, "eps", -1.0),
    (1, "eps", NAN),
    (1, "eps", "tiny"),
    # Cyclic schedulers write beta1 of AdamW groups under this name.
    (1, "momentum", 1.5),
    (1, "momentum", "high"),
]

# (parameter, key, value), of the momentum of a matrix (6, 4), of a vector (5,) and of counters.
STATE = [
    (0, "momentum_buffer", None),
    (0, "momentum_buffer", 0.0),
    (0, "momentum_buffer", [[0.0] * 4] * 6),
    (0, "momentum_buffer", torch.zeros(4, 6)),
    (0, "momentum_buffer", torch.zeros(6, 4, dtype=torch.int64)),
    (0, "momentum_buffer", torch.zeros(6, 4, dtype=torch.bool)),
    (0, "momentum_buffer", torch.zeros(6, 4, dtype=torch.complex64)),
    (0, "momentum_buffer", torch.zeros(6, 4).to_sparse()),
    (0, "momentum_buffer", torch.zeros(6, 4, device="meta")),
    (0, "momentum_buffer", torch.full((6, 4), NAN)),
    (0, "momentum_buffer", torch.full((6, 4), 1e300, dtype=torch.float64)),
    (0, "step", torch.tensor(-1.0)),
    (0, "step", torch.tensor(0.5)),
    (0, "step", torch.tensor([1.0])),
    (0, "step", torch.tensor(1)),
    (0, "step", 1),
    (0, "skipped", torch.tensor(INF)),
    (2, "exp_avg_sq", torch.full((5,), -1.0)),
    (2, "exp_avg", torch.full((5,), INF)),
]


@pytest.mark.parametrize(("group", "key", "value"), NUMBERS, ids=str)
def test_a_number_that_no_step_could_use_is_refused_by_its_name(group, key, value):
    saved = copy.deepcopy(trained(optimizer()).state_dict())
    saved["param_groups"][group][key] = value
    words = {"params": "", "algorithm": f"trained by {value!r}"}
    assert words.get(key, key) in refusal(saved, trained(optimizer()))


@pytest.mark.parametrize(("index", "key", "value"), STATE, ids=str)
def test_state_that_no_step_could_use_is_refused_by_its_parameter_and_name(index, key, value):
    saved = copy.deepcopy(trained(optimizer()).state_dict())
    saved["state"][index][key] = value
    message = refusal(saved, trained(optimizer()))
    assert ("'up.weight'", "", "'bias'")[index] in message and key in message


JUNK = (
    None,
    "x",
    3,
    -1,
    NAN,
    INF,
    True,
    [],
    {},
    (1, 2),
    torch.zeros(2),
    torch.zeros(()),
    torch.full((6, 4), NAN),
    1 + 1j,
    b"0",
)


def places(tree, path=()):
    """Every place of a nested dictionary that a value can be put into or taken from."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def test_three_hundred_random_edits_load_or_are_refused_and_never_crash_or_poison():
    draw, loaded = random.Random(0), 0
    whole, opt = trained(optimizer()).state_dict(), trained(optimizer())
    for _ in range(300):
        saved = copy.deepcopy(whole)
        for _ in range(draw.choice((1, 1, 2, 3))):
            tree, key = draw.choice(list(places(saved)))
            if isinstance(tree, dict) and draw.random() < 0.3:
                del tree[key]
            else:
                tree[key] = draw.choice(JUNK)
        try:
            opt.load_state_dict(saved)
        except ValueError:
            continue
        loaded += 1
        for p in (p for group in opt.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        opt.step()
        assert all(p.isfinite().all() for group in opt.param_groups for p in group["params"])
        opt = trained(optimizer())
    # None of the others has left a trace.
    assert refusal({}, opt)
    # An edit of what is the optimizer's own (an option that the rule's text fixes) is harmless; most are not.
    assert 0 < loaded < 100


@pytest.mark.parametrize("thing", [None, 3, "state", [], [{}], {"state": [], "param_groups": []}], ids=str)
def test_what_is_no_dictionary_of_the_kind_is_refused(thing):
    assert "state_dict" in refusal(thing, trained(optimizer()))


@pytest.mark.parametrize(
    "groups", [None, {}, "groups", [3], [{}], [{"params": 0}], [{"params": [torch.zeros(2)]}], [], [[]]], ids=str
)
def test_groups_of_another_form_are_refused(groups):
    saved = trained(optimizer()).state_dict()
    refusal({**saved, "param_groups": groups}, trained(optimizer()))


def test_an_entry_of_state_that_is_no_dictionary_is_refused_by_its_parameter():
    for entry in (None, 3, [], torch.zeros(6, 4)):
        saved = trained(optimizer()).state_dict()
        saved["state"] = {**saved["state"], 1: entry}
        assert "'down.weight' of shape (3, 5)" in refusal(saved, trained(optimizer()))
