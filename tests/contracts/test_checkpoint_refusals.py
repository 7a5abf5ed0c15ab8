"""A checkpoint that does not fit is refused in words, and the optimizer is as it was before."""

import copy
import re

import pytest
import torch
from torch import nn

import schatten

NAMES = ("up.weight", "down.weight", "bias")


def named(shapes=((6, 4), (3, 5), (5,))):
    return [(name, nn.Parameter(torch.randn(s))) for name, s in zip(NAMES, shapes, strict=True)]


def optimizer(params=None, **options):
    params = named() if params is None else params
    return schatten.Muon([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}], **options)


def trained(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    opt.step()
    return opt


def refusal(state_dict, opt, error=ValueError):
    """The message of the refusal, after checking that loading changed neither weights, state, groups nor the dictionary."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in copy.deepcopy(opt.param_groups)]
    params = [p for group in opt.param_groups for p in group["params"]]
    weights, state = [p.detach().clone() for p in params], [copy.deepcopy(opt.state[p]) for p in params]
    given = copy.deepcopy(state_dict)
    with pytest.raises(error) as caught:
        opt.load_state_dict(state_dict)
    assert [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups] == groups
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    for p, s in zip(params, state, strict=True):
        assert opt.state[p].keys() == s.keys() and all(torch.equal(opt.state[p][k], s[k]) for k in s)
    assert repr(state_dict) == repr(given)
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "keller"},
        {"nesterov": False},
        {"form": "sum"},
        {"decay": "implicit"},
        {"solver": schatten.solvers.newton_schulz()},
        {"solver": schatten.solvers.polynomial(tol=1e-3)},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_rule_is_refused_with_both_texts(options):
    theirs, ours = trained(optimizer(**options)), trained(optimizer())
    message = refusal(theirs.state_dict(), ours)
    assert f"checkpoint: {theirs.rule(theirs.param_groups[0])!r}" in message
    assert f"optimizer:  {ours.rule(ours.param_groups[0])!r}" in message


def test_the_numbers_of_a_schedule_are_no_other_rule():
    theirs = trained(optimizer(lr=0.3, momentum=0.5, weight_decay=0.0, rounding="nearest"))
    ours = optimizer()
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["momentum"] == 0.5 and ours.param_groups[0]["rounding"] == "nearest"


def foreign(kind):
    tensors = [nn.Parameter(torch.randn(s)) for s in ((6, 4), (3, 5), (5,))]
    opt = kind([{"params": tensors[:2]}, {"params": tensors[2:]}], lr=0.1)
    return trained(opt).state_dict()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_other_optimizers_states_are_refused(kind):
    message = refusal(foreign(kind), trained(optimizer()))
    assert "not a checkpoint of a schatten optimizer" in message and "weight_decay" in message


@pytest.mark.parametrize(
    "thing", [{}, {"state": {}}, nn.Linear(2, 2).state_dict(), {"optimizer": {"state": {}, "param_groups": []}}], ids=range(4)
)
def test_what_is_no_optimizers_state_is_refused_in_words(thing):
    message = refusal(thing, trained(optimizer()))
    assert "param_groups" in message and "state_dict" in message


def test_another_schema_is_refused_with_both_numbers():
    saved = trained(optimizer()).state_dict()
    for group in saved["param_groups"]:
        group["schema"] = 999
    assert re.search(r"schema 999.* schema 1", refusal(saved, trained(optimizer())))


def test_another_number_of_groups_is_refused_with_both_numbers():
    saved = schatten.Muon(named()[:2]).state_dict()
    assert "1 parameter groups, this optimizer 2" in refusal(saved, trained(optimizer()))


def test_another_number_of_parameters_is_refused_with_both_numbers():
    saved = schatten.Muon([{"params": named()[:1]}, {"params": named()[2:], "algorithm": "adamw"}]).state_dict()
    assert "has 1 parameters, this optimizer's has 2" in refusal(saved, trained(optimizer()))


def test_a_group_trained_by_the_other_algorithm_is_refused():
    saved = schatten.Muon([{"params": named()[:2], "algorithm": "adamw"}, {"params": named()[2:], "algorithm": "adamw"}])
    message = refusal(saved.state_dict(), trained(optimizer()))
    assert "by 'adamw'" in message and "by 'spectral'" in message


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((6, 4), (5, 3), (5,)), ("'down.weight' of shape (3, 5)", "(5, 3)")),
        (((6, 4), (3, 5), (7,)), ("'bias' of shape (5,)", "(7,)")),
    ],
    ids=["spectral", "adamw"],
)
def test_another_shape_is_refused_naming_the_parameter_and_both_shapes(shapes, words):
    message = refusal(trained(optimizer(named(shapes))).state_dict(), trained(optimizer()))
    assert all(word in message for word in words) and "'up.weight'" not in message


def test_the_same_names_in_another_order_are_refused_even_where_shapes_agree():
    def build(*names):
        return trained(schatten.Muon([(name, nn.Parameter(torch.randn(6, 4))) for name in names]))

    message = refusal(build("query", "key").state_dict(), build("key", "query"))
    assert "'key'" in message and "'query'" in message and "order" in message


def test_missing_state_is_refused_naming_the_parameter():
    saved = trained(optimizer()).state_dict()
    del saved["state"][1]
    assert "'down.weight' of shape (3, 5)" in refusal(saved, trained(optimizer()))


def test_a_missing_buffer_is_refused_naming_the_parameter():
    saved = trained(optimizer()).state_dict()
    saved["state"] = {i: dict(s) for i, s in saved["state"].items()}
    del saved["state"][0]["momentum_buffer"]
    message = refusal(saved, trained(optimizer()))
    assert "'up.weight' of shape (6, 4)" in message and "momentum_buffer" in message
