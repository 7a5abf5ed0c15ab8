"""Overrides of a plan, and its refusals: the first match wins, and nothing that cannot be meant passes silently."""

import math
import re

import pytest
import torch
from torch import nn

import schatten
from schatten import plan
from schatten.layout import KINDS, Layout, pieces, resolve


@pytest.fixture
def model():
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 20, bias=False))


class Banks(nn.Module):
    def __init__(self):
        super().__init__()
        self.three = nn.Parameter(torch.zeros(3, 4, 6))
        self.four = nn.Parameter(torch.zeros(2, 3, 4, 6))
        self.body = nn.Linear(4, 4)
        self.conv = nn.Conv2d(3, 4, 3)


def by_name(found):
    return {entry.name: entry for entry in found}


def test_a_rule_sends_a_parameter_and_gives_itself_as_the_reason(model):
    found = by_name(plan(model, rules=[("1.weight", "adamw")]))
    assert (found["1.weight"].route, found["1.weight"].reason) == ("adamw", "rule '1.weight'")
    assert found["2.weight"].route == "spectral"


def test_the_first_matching_rule_wins(model):
    found = by_name(plan(model, rules=[("1.weight", "spectral"), ("*.weight", "adamw"), ("*", "spectral")][:2]))
    assert {name: entry.route for name, entry in found.items()} == {
        "0.weight": "adamw",
        "1.weight": "spectral",
        "1.bias": "adamw",
        "2.weight": "adamw",
        "3.weight": "adamw",
    }
    assert found["1.weight"].reason == "rule '1.weight'" and found["2.weight"].reason == "rule '*.weight'"


def test_a_shadowed_rule_still_counts_as_matching(model):
    plan(model, rules=[("*.weight", "spectral"), ("1.weight", "adamw")])


def test_rules_can_force_what_the_modules_deny(model):
    found = by_name(plan(model, rules=[("[03].weight", "spectral")]))
    assert found["0.weight"].route == found["3.weight"].route == "spectral"


@pytest.mark.parametrize("glob", ["nope", "1.Weight", "weight", "4.*", "1"])
def test_a_rule_without_a_match_is_refused_with_its_glob(model, glob):
    with pytest.raises(ValueError, match=f"Rule '{glob}' matches no parameter".replace("*", r"\*")) as error:
        plan(model, rules=[("1.*", "adamw"), (glob, "adamw")])
    assert "0.weight, 1.weight, 1.bias" in str(error.value), "the message shows what names look like"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (("1.weight", "muon"), "route must be one of 'spectral', 'adamw', 'auto', got 'muon' for '1.weight'"),
        (("1.weight",), r"A rule is \(pattern, route\) and then, .*, got \('1.weight',\)"),
        (("1.weight", "adamw", True), r"A rule is \(pattern, route\) and then"),
        (("1.weight", "adamw", {}, {}), r"A rule is \(pattern, route\) and then"),
        (("1.weight", "adamw", {}, 1e-3), r"A rule is \(pattern, route\) and then"),
        (("1.weight", "adamw", 1e-3, {"lr": 1e-4}), r"says a thing once, but 'lr' is in .* twice"),
        (("1.weight", "spectral", "matrix", Layout(split=2)), r"says a thing once, but 'layout' is in .* twice"),
        ("1.weight", r"A rule is \(pattern, route\) and then, .*, got '1.weight'"),
        ((1, "adamw"), r"pattern is a glob, a compiled regular expression or a function .*, got 1 in"),
        ((nn.Linear, "adamw"), r"pattern is a glob, a compiled regular expression or a function"),
        (("1.bias", "spectral"), r"needs matrices, but '1.bias' has shape \(8,\)"),
        (("1.weight", "spectral", {"layout": "rows"}), "layout must be one of .*, got 'rows'"),
        (("1.weight", "spectral", "rows"), "layout must be one of .*, got 'rows'"),
        (
            ("1.weight", "spectral", Layout(split=(3, 4))),
            r"'1.weight' of shape \(8, 8\) has 8 there and split=\(3, 4\) adds up to 7",
        ),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(model, rule, text):
    with pytest.raises(ValueError, match=text):
        plan(model, rules=[rule])


def test_a_rule_may_give_layout_and_lr_in_their_places(model):
    rules = [("1.weight", "spectral", Layout(split=2), 1e-4, {"weight_decay": 0.0}), ("2.weight", "spectral", 1e-3)]
    found = by_name(plan(model, rules))
    assert found["1.weight"].layout == Layout("matrix", split=2)
    assert dict(found["1.weight"].options) == {"lr": 1e-4, "weight_decay": 0.0}
    assert (found["2.weight"].layout, dict(found["2.weight"].options)) == ("matrix", {"lr": 1e-3})
    opt = schatten.Muon(model, lr=0.02, rules=rules)
    groups = {name: g for g in opt.param_groups for name in g["param_names"]}
    assert (groups["1.weight"]["lr"], groups["1.weight"]["layout"]) == (1e-4, Layout("matrix", split=2))
    assert (groups["2.weight"]["lr"], groups["3.weight"]["lr"]) == (1e-3, 0.02)
    lr = torch.tensor(0.5)
    assert dict(by_name(plan(model, [("1.weight", "spectral", lr)]))["1.weight"].options)["lr"] is lr


def test_equal_routes_layouts_and_options_share_a_group(model):
    rules = [("[12].weight", "spectral", Layout(split=2), 1e-4)]
    groups = schatten.Muon(model, rules=rules).param_groups
    assert [g["param_names"] for g in groups] == [["1.weight", "2.weight"], ["0.weight", "1.bias", "3.weight"]]


@pytest.mark.parametrize(
    "pattern",
    [
        re.compile(r"^[12]\.weight$"),
        lambda name, module, p: isinstance(module, nn.Linear) and tuple(p.shape) == (8, 8),
        "[12].weight",
    ],
    ids=["regex", "function", "glob"],
)
def test_a_pattern_is_a_glob_a_regex_or_a_function(model, pattern):
    found = plan(model, rules=[(pattern, "adamw"), ("3.weight", "spectral")])
    assert {e.name for e in found if e.reason.startswith("rule")} == {"1.weight", "2.weight", "3.weight"}
    with pytest.raises(ValueError, match=r"Rule .* matches no parameter"):
        plan(nn.Sequential(nn.Linear(4, 4)), rules=[(pattern, "adamw")])


def test_a_regex_is_searched_for_in_the_name(model):
    assert by_name(plan(model, rules=[(re.compile("1"), "adamw")]))["1.weight"].route == "adamw"


def test_a_function_without_a_match_is_named(model):
    def nothing(name, module, p):
        return False

    with pytest.raises(ValueError, match="Rule nothing matches no parameter"):
        plan(model, rules=[(nothing, "adamw")])


def test_a_rule_without_a_layout_keeps_the_layout_the_module_has():
    attention = nn.MultiheadAttention(8, 2)
    for route in ("spectral", "auto"):
        found = by_name(plan(attention, rules=[("in_proj_weight", route, 1e-3)]))["in_proj_weight"]
        assert (found.route, found.layout) == ("spectral", Layout("matrix", split=3))
    assert by_name(plan(attention, rules=[("in_proj_weight", "spectral", "auto")]))["in_proj_weight"].layout == "matrix"


def test_a_layout_of_a_parameter_that_goes_to_adamw_is_no_error(model):
    # So that a route can be tried by changing one word.
    entry = by_name(plan(model, rules=[("1.weight", "adamw", Layout(split=2), 1e-3)]))["1.weight"]
    assert (entry.route, entry.layout, dict(entry.options)) == ("adamw", "-", {"lr": 1e-3})


# Row 15 of users.md section 3: a table that was moved to AdamW lost its lr and decay with the move.
@pytest.mark.parametrize("rerouted", [None, "spectral", "adamw"], ids=str)
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias"])
def test_an_lr_and_decay_given_to_a_parameter_survive_any_route(model, name, rerouted):
    if name == "1.bias" and rerouted == "spectral":
        rerouted = "adamw"
    own = (name, "auto", 3e-4, {"weight_decay": 0.0})
    moved = [(name, rerouted)] if rerouted else []
    plain = by_name(plan(model))[name].route
    for rules in ([own, *moved], [*moved, own]):
        opt = schatten.Muon(model, lr=0.02, weight_decay=0.1, adamw={"lr": 1e-3}, rules=rules)
        group = next(g for g in opt.param_groups if name in g["param_names"])
        assert (group["algorithm"], group["lr"], group["weight_decay"]) == (rerouted or plain, 3e-4, 0.0)
        others = {g["lr"] for g in opt.param_groups if name not in g["param_names"]}
        assert others <= {0.02, 1e-3}


def test_without_rules_a_moved_table_trains_by_the_lr_of_its_new_route(model):
    opt = schatten.Muon(model, lr=0.02, adamw={"lr": 1e-3}, rules=[("0.weight", "spectral")])
    assert next(g for g in opt.param_groups if "0.weight" in g["param_names"])["lr"] == 0.02


def test_of_rules_that_only_set_options_the_first_gives_each(model):
    rules = [("1.*", "auto", {"lr": 1.0}), ("*.weight", "auto", {"lr": 2.0, "weight_decay": 0.5}), ("*", "auto", {"lr": 3.0})]
    found = {e.name: dict(e.options) for e in plan(model, rules)}
    assert found["1.weight"] == {"lr": 1.0, "weight_decay": 0.5}
    assert found["1.bias"] == {"lr": 1.0}
    assert found["2.weight"] == {"lr": 2.0, "weight_decay": 0.5}


def test_a_rule_that_lost_its_parameter_to_an_earlier_one_gives_it_no_options(model):
    rules = [("1.weight", "adamw"), ("*.weight", "spectral", {"lr": 1.0})]
    found = {e.name: dict(e.options) for e in plan(model, rules)}
    assert found["1.weight"] == {} and found["2.weight"] == {"lr": 1.0}


def test_a_rule_for_frozen_parameters_is_a_match_and_routes_nothing(model):
    model[1].requires_grad_(False)
    found = plan(model, rules=[("1.*", "adamw")])
    assert found.frozen == 2 and "1.weight" not in by_name(found)


@pytest.mark.parametrize("name", ["0.weight", "3.weight"])
def test_a_tied_parameter_answers_to_all_its_names(model, name):
    # Megatron-LM 4641: one of two tied names was trained by another rule.
    model[3].weight = model[0].weight
    found = plan(model, rules=[(name, "spectral")])
    assert [e.name for e in found if e.reason.startswith("rule")] == ["0.weight"]
    assert len(found) == 4


@pytest.mark.parametrize("options", [{"lrr": 1.0}, {"params": []}, {"algorithm": "adamw"}], ids=str)
def test_an_option_no_group_has_is_refused(model, options):
    # A misspelt lr would train at the default lr, with the wrong one printed in the plan.
    with pytest.raises(ValueError, match=next(iter(options))):
        schatten.Muon(model, rules=[("1.weight", "spectral", options)])


def test_options_of_a_rule_end_in_its_group(model):
    rules = [
        ("1.weight", "spectral", {"lr": 1e-4, "weight_decay": 0.0}),
        ("0.weight", "adamw", {"lr": 0.3, "betas": (0.8, 0.9)}),
    ]
    assert "rule '1.weight', lr=0.0001, weight_decay=0.0" in str(plan(model, rules))
    opt = schatten.Muon(model, lr=0.02, weight_decay=0.1, rules=rules)
    groups = {name: g for g in opt.param_groups for name in g["param_names"]}
    assert (groups["1.weight"]["lr"], groups["1.weight"]["weight_decay"]) == (1e-4, 0.0)
    assert (groups["0.weight"]["lr"], groups["0.weight"]["betas"]) == (0.3, (0.8, 0.9))
    assert (groups["2.weight"]["lr"], groups["2.weight"]["weight_decay"]) == (0.02, 0.1)
    assert groups["1.bias"]["lr"] == 0.02
    assert [len(g["params"]) for g in opt.param_groups] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "layout", "read_as"),
    [
        ("three", "experts", "3 of 4x6"),
        ("three", "conv", "3x24"),
        ("four", "experts", "6 of 4x6"),
        ("four", "conv", "2x72"),
        ("four", "auto", "2x72"),
        ("four", "positions", "24 of 2x3"),
        ("three", Layout("experts", split=2), "6 of 2x6 (experts, split 2)"),
        ("three", Layout("experts", transpose=True, split=(2, 4)), "3 of 2x4 + 3 of 4x4 (experts, split (2, 4), transposed)"),
        ("conv.weight", "experts", "12 of 3x3"),
        ("body.weight", "experts", "4x4"),
    ],
)
@pytest.mark.parametrize("form", [lambda layout: {"layout": layout}, lambda layout: layout], ids=["option", "in its place"])
def test_the_optimizer_reads_a_parameter_as_the_plan_says(name, layout, read_as, form):
    model = Banks()
    rules = [(name, "spectral", form(layout)), ("three", "adamw"), ("four", "adamw")]
    found = plan(model, rules)
    line = next(line for line in str(found).splitlines() if line.startswith(f"{name} "))
    assert f" {read_as} " in line
    opt = schatten.Muon(model, rules=rules)
    group = next(g for g in opt.param_groups if name in g["param_names"])
    entry = by_name(found)[name]
    own = resolve(group["layout"], entry.shape, name)
    assert pieces(own, entry.shape) == pieces(entry.layout, entry.shape), f"planned {entry.layout}, stepped as {own}"


def test_a_bank_needs_its_layout_in_words():
    with pytest.raises(ValueError, match=r"'three' of shape \(3, 4, 6\) may be a 1-D convolution or a bank of matrices"):
        plan(Banks(), rules=[("three", "spectral"), ("four", "adamw")])
    with pytest.raises(ValueError, match=r"layout 'matrix' needs two dimensions, but 'three' has shape \(3, 4, 6\)"):
        plan(Banks(), rules=[("three", "spectral", {"layout": "matrix"}), ("four", "adamw")])


@pytest.mark.parametrize("layout", KINDS)
def test_every_layout_covers_every_entry_once(layout):
    for shape in ((4, 6), (3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 5, 6)):
        if (layout == "matrix" and len(shape) != 2) or (layout == "auto" and len(shape) == 3):
            continue
        (piece,) = pieces(resolve(layout, shape, "p"), shape)
        assert math.prod(piece.blocks) == math.prod(shape)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.Embedding(10, 4), "embedding"),
        (lambda: nn.Sequential(nn.LayerNorm(4), nn.PReLU()), r"norm weight \(LayerNorm\)"),
        (lambda: nn.Linear(4, 4).requires_grad_(False), "frozen, not trained: 2 tensors"),
        (nn.ReLU, "spectral: 0 tensors"),
    ],
    ids=["embedding", "norms", "all frozen", "no parameters"],
)
def test_a_model_without_a_spectral_matrix_is_refused_with_its_plan(build, names):
    with pytest.raises(ValueError, match="No parameter of this model is routed to a spectral rule") as error:
        plan(build())
    assert error.match(names)
    with pytest.raises(ValueError, match="No parameter of this model"):
        schatten.Muon(build())


def test_a_lazy_module_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'1\.weight' has no shape yet: run one batch through the lazy module"):
        plan(model)
    model(torch.zeros(2, 4))
    assert by_name(plan(model))["1.weight"].route == "spectral"


@pytest.mark.parametrize("thing", [[1], nn.Linear(2, 2).parameters(), nn.Linear], ids=["list", "generator", "class"])
def test_only_a_module_can_be_planned(thing):
    with pytest.raises(TypeError, match=r"plan reads a torch\.nn\.Module, got"):
        plan(thing)


def test_rules_need_names(model):
    with pytest.raises(ValueError, match="rules route a module's parameters by name: pass the module itself"):
        schatten.Muon([model[1].weight], rules=[("*", "spectral")])
