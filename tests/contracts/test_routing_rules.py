"""Overrides of a plan, and its refusals: the first match wins, and nothing that cannot be meant passes silently."""

import pytest
import torch
from torch import nn

import schatten
from schatten import plan
from schatten.layout import KINDS as LAYOUTS, blocks, resolve


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
        (("1.weight", "muon"), "route must be one of 'spectral', 'adamw', got 'muon' for '1.weight'"),
        (("1.weight",), r"A rule is \(glob, route\) or \(glob, route, options dict\), got \('1.weight',\)"),
        (("1.weight", "adamw", 3), r"A rule is \(glob, route\) or"),
        (("1.weight", "adamw", {}, {}), r"A rule is \(glob, route\) or"),
        ("1.weight", r"A rule is \(glob, route\) or \(glob, route, options dict\), got '1.weight'"),
        (("1.bias", "spectral"), r"needs matrices, but '1.bias' has shape \(8,\)"),
        (("1.weight", "spectral", {"layout": "rows"}), "layout must be one of .*, got 'rows'"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(model, rule, text):
    with pytest.raises(ValueError, match=text):
        plan(model, rules=[rule])


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
        ("conv.weight", "experts", "12 of 3x3"),
        ("body.weight", "experts", "4x4"),
    ],
)
def test_the_optimizer_reads_a_parameter_as_the_plan_says(name, layout, read_as):
    model = Banks()
    found = plan(model, rules=[(name, "spectral", {"layout": layout})])
    line = next(line for line in str(found).splitlines() if line.startswith(f"{name} "))
    assert f" {read_as} " in line
    opt = schatten.Muon(model, rules=[(name, "spectral", {"layout": layout})])
    group = next(g for g in opt.param_groups if name in g["param_names"])
    entry = by_name(found)[name]
    own = resolve(group["layout"], entry.shape, name)
    assert blocks(own, entry.shape) == blocks(entry.layout, entry.shape), f"planned {entry.layout}, stepped as {own}"


def test_a_bank_needs_its_layout_in_words():
    with pytest.raises(ValueError, match=r"'three' of shape \(3, 4, 6\) may be a 1-D convolution or a bank of matrices"):
        plan(Banks(), rules=[("three", "spectral")])
    with pytest.raises(ValueError, match=r"layout 'matrix' needs two dimensions, but 'three' has shape \(3, 4, 6\)"):
        plan(Banks(), rules=[("three", "spectral", {"layout": "matrix"})])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_covers_every_entry_once(layout):
    for shape in ((4, 6), (3, 4, 6), (2, 3, 4, 6), (2, 3, 4, 5, 6)):
        if (layout == "matrix" and len(shape) != 2) or (layout == "auto" and len(shape) == 3):
            continue
        count, fan_out, fan_in = blocks(resolve(layout, shape, "p"), shape)
        assert count * fan_out * fan_in == torch.Size(shape).numel()


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
