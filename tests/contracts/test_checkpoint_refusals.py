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
    assert ("schatten.converters.from_adamw" in message) == (kind is not torch.optim.SGD)


@pytest.mark.parametrize(
    ("keys", "offer"),
    [
        (("lr", "momentum", "weight_decay", "use_muon"), "from_keller"),
        (("lr", "use_muon", "ns_coeffs", "weight_decouple"), "from_pytorch_optimizer"),
        (("lr", "mu", "algorithm", "step"), "from_dion"),
        (("lr", "wd", "adamw_betas"), "from_moonlight"),
    ],
    ids=str,
)
def test_a_checkpoint_that_a_converter_reads_is_refused_with_its_name(keys, offer):
    saved = {"state": {}, "param_groups": [{**dict.fromkeys(keys, 0.1), "params": [0]}]}
    assert f"schatten.converters.{offer}(state_dict, opt)" in refusal(saved, trained(optimizer()))


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


# -- names, routes and layouts ---------------------------------------------------------------------------------------------


def test_missing_and_unknown_names_are_listed_together():
    saved = trained(optimizer()).state_dict()
    saved["param_groups"][0]["param_names"] = ["up.weight", "gate.weight"]
    saved["param_groups"][1]["param_names"] = ["gain"]
    message = refusal(saved, trained(optimizer()))
    for word in ("'down.weight' is missing", "'bias' is missing", "'gate.weight' is not trained", "'gain' is not trained"):
        assert word in message
    assert "'up.weight'" not in message


@pytest.mark.parametrize("rename", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "model.{}"])
def test_a_wrapper_s_names_are_the_same_names(rename):
    ours, theirs = trained(optimizer()), trained(optimizer())
    for opt in (ours, theirs):
        other = theirs if opt is ours else ours
        saved = other.state_dict()
        for group in saved["param_groups"]:
            group["param_names"] = [rename.format(name) for name in group["param_names"]]
        opt.load_state_dict(saved)
    assert ours.param_groups[0]["param_names"] == ["up.weight", "down.weight"]


def test_a_parameter_that_went_to_another_route_or_group_is_named_though_group_counts_differ():
    params = named(((6, 4), (3, 5), (5, 2)))
    ours = schatten.Muon([{"params": [p]} for p in params[:2]] + [{"params": params[2:], "algorithm": "adamw"}])
    theirs = named(((6, 4), (3, 5), (5, 2)))
    saved = schatten.Muon([{"params": [theirs[0], theirs[2]]}, {"params": [theirs[1]], "algorithm": "adamw"}]).state_dict()
    message = refusal(saved, ours)
    assert "2 parameter groups, this optimizer 3" in message
    assert "'down.weight' is trained by 'adamw' in the checkpoint and by 'spectral' here" in message
    assert "'bias' is trained by 'spectral' in the checkpoint and by 'adamw' here" in message


def test_a_parameter_in_another_group_of_its_route_is_named():
    def build(sizes):
        rest = iter(named(((6, 4), (3, 5), (5, 2))))
        return schatten.Muon([{"params": [next(rest) for _ in range(size)]} for size in sizes])

    message = refusal(build((1, 2)).state_dict(), build((2, 1)))
    assert "'down.weight' is in group 1 of the checkpoint and in group 0 here" in message


@pytest.mark.parametrize(
    "names", ["up.weight", ["up.weight"], ["up.weight", 3], {"up.weight": 1, "down.weight": 2}, 5], ids=repr
)
def test_names_of_another_form_are_refused(names):
    saved = trained(optimizer()).state_dict()
    saved["param_groups"][0]["param_names"] = names
    assert "param_names" in refusal(saved, trained(optimizer()))


@pytest.mark.parametrize(
    ("theirs", "ours", "shape"),
    [
        ("conv", "positions", (6, 4, 3, 3)),
        ("auto", "experts", (6, 4, 3, 3)),
        ("experts", "conv", (2, 6, 4)),
        (schatten.Layout(split=2), "auto", (6, 4)),
        (schatten.Layout(split=2), schatten.Layout(heads=2), (6, 4)),
        ("matrix", schatten.Layout(transpose=True), (6, 4)),
    ],
    ids=str,
)
def test_another_layout_is_refused_with_both_and_the_parameter(theirs, ours, shape):
    def build(layout):
        return schatten.Muon([{"params": [("W", nn.Parameter(torch.zeros(shape)))], "layout": layout}])

    message = refusal(build(theirs).state_dict(), build(ours))
    assert f"'W' of shape {shape}" in message and "layout" in message
    for layout in (theirs, ours):
        assert (layout.kind if isinstance(layout, schatten.Layout) and layout.kind != "auto" else str(layout)[:5]) in message


def test_another_state_dtype_is_refused_with_both():
    def build(state_dtype):
        return schatten.Muon([{"params": named()[:2], "state_dtype": state_dtype}])

    message = refusal(build("bfloat16").state_dict(), build(None))
    assert "state_dtype is 'bfloat16', this optimizer's None" in message


@pytest.mark.parametrize(("theirs", "ours"), [("kahan", "stochastic"), ("nearest", "kahan")])
def test_kahan_s_rounding_and_another_do_not_share_state(theirs, ours):
    def build(rounding, dtype):
        return schatten.Muon([nn.Parameter(torch.zeros(6, 4, dtype=dtype))], rounding=rounding)

    message = refusal(build(theirs, torch.bfloat16).state_dict(), build(ours, torch.bfloat16))
    assert f"rounding is {theirs!r}, this optimizer's {ours!r}" in message
    # In fp32 nothing is rounded and nothing kept.
    build(ours, torch.float32).load_state_dict(build(theirs, torch.float32).state_dict())


# -- one error for all of it -----------------------------------------------------------------------------------------------


def test_partial_and_missing_entries_are_all_in_one_error():
    saved = copy.deepcopy(trained(optimizer()).state_dict())
    del saved["state"][0]["momentum_buffer"], saved["state"][1]
    saved["state"][2]["exp_avg"] = torch.zeros(7)
    saved["state"][2]["extra"] = torch.zeros(5)
    saved["state"][99] = {"step": torch.zeros(())}
    del saved["param_groups"][0]["momentum"], saved["param_groups"][1]["betas"]
    message = refusal(saved, trained(optimizer()))
    for word in (
        "group 0: 'momentum' is missing",
        "group 1: 'betas' is missing",
        "'up.weight' of shape (6, 4): momentum_buffer (6, 4) is missing",
        "'down.weight' of shape (3, 5): has no state, needs momentum_buffer",
        "'bias' of shape (5,): exp_avg has shape (7,), not (5,); 'extra' is no state of it",
        "State of no parameter, number 99",
    ):
        assert word in message


def test_a_long_list_of_problems_is_cut_and_counted():
    def build():
        return schatten.Muon([(f"layers.{i}.weight", nn.Parameter(torch.zeros(4, 4))) for i in range(50)])

    saved = build().state_dict()
    saved["state"] = {}
    message = refusal(saved, build())
    assert message.count("has no state") == 20 and "and 30 more" in message
