"""`schatten.plan` decides by modules: every parameter of small hand-written models goes where a practitioner would send it."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten import plan


def routes(model, **options):
    return {entry.name: entry.route for entry in plan(model, **options)}


def reasons(model, **options):
    return {entry.name: entry.reason for entry in plan(model, **options)}


class GPT(nn.Module):
    """Vocabulary 20, width 8. `tie`: which of the two tied weights is assigned to the other; `first`: the head comes first."""

    def __init__(self, tie=None, first=False, context=5, head=True):
        super().__init__()
        if head and first:
            self.lm_head = nn.Linear(8, 20, bias=False)
        self.wte = nn.Embedding(20, 8)
        self.wpe = nn.Embedding(context, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "attn": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "up": nn.Linear(8, 20)})
            for _ in range(2)
        )
        self.norm = nn.RMSNorm(8)
        if head and not first:
            self.lm_head = nn.Linear(8, 20, bias=False)
        if tie == "head to table":
            self.lm_head.weight = self.wte.weight
        if tie == "table to head":
            self.wte.weight = self.lm_head.weight


HIDDEN = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("attn", "proj", "up")}


@pytest.mark.parametrize("context", [5, 8, 20], ids=lambda c: f"context {c}")
@pytest.mark.parametrize("first", [False, True], ids=["head last", "head first"])
@pytest.mark.parametrize("tie", ["head to table", "table to head"])
def test_of_a_tied_gpt_exactly_the_hidden_matrices_are_spectral(tie, first, context):
    # A context of 8 makes the position table 8 x 8 as a hidden Linear, one of 20 makes it as large as the vocabulary.
    model = GPT(tie, first, context)
    found = routes(model)
    assert {name for name, route in found.items() if route == "spectral"} == HIDDEN
    assert ("lm_head.weight" in found) != ("wte.weight" in found), "a tied weight is listed once"
    assert reasons(model)["lm_head.weight" if first else "wte.weight"] == "embedding, tied with lm_head.weight"


@pytest.mark.parametrize("context", [5, 8], ids=lambda c: f"context {c}")
def test_of_an_untied_gpt_with_its_head_last_the_hidden_matrices_are_spectral(context):
    # The up-projections map 8 onto 20 too: only the last Linear of that shape is the head.
    model = GPT(context=context)
    assert {name for name, route in routes(model).items() if route == "spectral"} == HIDDEN
    assert reasons(model)["lm_head.weight"] == "output head, named lm_head"


def test_of_an_untied_gpt_with_its_head_first_the_hidden_matrices_are_spectral():
    class HeadFirst(GPT):
        def __init__(self):
            super().__init__(first=True)
            for block in self.blocks:
                del block["up"]  # no hidden Linear has the head's shape

    model = HeadFirst()
    assert {name for name, route in routes(model).items() if route == "spectral"} == {n for n in HIDDEN if "up" not in n}
    assert reasons(model)["lm_head.weight"] == "output head, named lm_head"
    # By any other name it is told by its shape.
    model.onto_tokens = model.lm_head
    del model.lm_head
    assert reasons(model)["onto_tokens.weight"] == "output head: Linear onto the vocabulary of wte.weight"


@pytest.mark.parametrize("container", ["ModuleList", "Sequential", "ModuleDict", "attributes"])
@pytest.mark.parametrize("context", [5, 8], ids=lambda c: f"context {c}")
def test_a_square_position_table_makes_no_hidden_matrix_a_head(context, container):
    # Tied in forward() by F.linear(x, self.wte.weight), there is no head module. GPT-2 medium has context = width = 1024.
    model = GPT(head=False, context=context)
    blocks = list(model.blocks)
    for block in blocks:
        del block["up"]
    if container == "Sequential":
        model.blocks = nn.Sequential(*blocks)
    elif container == "ModuleDict":
        model.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
    elif container == "attributes":
        model.blocks = nn.Module()
        for i, block in enumerate(blocks):
            setattr(model.blocks, str(i), block)
    assert {name for name, route in routes(model).items() if route == "spectral"} == {n for n in HIDDEN if "up" not in n}


def test_a_head_with_a_bias_keeps_its_bias_a_bias():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))
    assert routes(model)["2.weight"] == "adamw"
    assert reasons(model)["2.bias"] == "bias"


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(4, 4))
        self.bank = nn.Parameter(torch.zeros(3, 4, 5))
        self.gain = nn.Parameter(torch.zeros(4))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(4, 6)
        self.bag = nn.EmbeddingBag(7, 4)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, (3, 5))
        self.conv3 = nn.Conv3d(2, 5, 2)
        self.layer_norm = nn.LayerNorm(6)
        self.rms_norm = nn.RMSNorm(6)
        self.group_norm = nn.GroupNorm(2, 6)
        self.batch_norm = nn.BatchNorm2d(6)
        self.instance_norm = nn.InstanceNorm2d(6, affine=True)
        self.table_norm = nn.LayerNorm((4, 6))
        self.bilinear = nn.Bilinear(4, 4, 5)
        self.lstm = nn.LSTM(4, 4)
        self.prelu = nn.PReLU()


# What only its author knows.
RULES = [("matrix", "spectral"), ("bank", "spectral", "experts"), ("bilinear.weight", "adamw")]

EXPECTED = {
    "matrix": ("adamw", "Everything.matrix is of no known kind: add a rule if it is a matrix"),
    "bank": ("adamw", "Everything.bank is of no known kind: add a rule if it is a matrix"),
    "gain": ("adamw", "vector (Everything.gain)"),
    "temperature": ("adamw", "scalar"),
    "linear.weight": ("spectral", "hidden Linear"),
    "linear.bias": ("adamw", "bias"),
    "bag.weight": ("adamw", "embedding"),
    "conv1.weight": ("spectral", "hidden convolution"),
    "conv1.bias": ("adamw", "bias"),
    "conv2.weight": ("spectral", "hidden convolution"),
    "conv3.weight": ("spectral", "hidden convolution"),
    "layer_norm.weight": ("adamw", "norm weight (LayerNorm)"),
    "layer_norm.bias": ("adamw", "norm bias (LayerNorm)"),
    "rms_norm.weight": ("adamw", "norm weight (RMSNorm)"),
    "group_norm.bias": ("adamw", "norm bias (GroupNorm)"),
    "batch_norm.weight": ("adamw", "norm weight (BatchNorm2d)"),
    "instance_norm.weight": ("adamw", "norm weight (InstanceNorm2d)"),
    "table_norm.weight": ("adamw", "norm weight (LayerNorm)"),
    "bilinear.weight": ("adamw", "Bilinear.weight is of no known kind: add a rule if it is a matrix"),
    "lstm.weight_hh_l0": ("spectral", "4 gates (LSTM)"),
    "lstm.weight_ih_l0": ("spectral", "4 gates (LSTM)"),
    "lstm.bias_hh_l0": ("adamw", "bias"),
    "prelu.weight": ("adamw", "vector (PReLU.weight)"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_parameter_goes_by_its_module(name):
    entry = {entry.name: entry for entry in plan(Everything(), strict=False)}[name]
    assert (entry.route, entry.reason) == EXPECTED[name]


def test_no_spectral_parameter_is_unexpected():
    spectral = {name for name, route in routes(Everything(), strict=False).items() if route == "spectral"}
    assert spectral == {name for name, (route, _) in EXPECTED.items() if route == "spectral"}


@pytest.mark.parametrize(
    ("name", "fan_out", "fan_in"), [("conv1", 6, 12), ("conv2", 6, 60), ("conv3", 5, 16), ("linear", 6, 4)]
)
def test_a_convolution_is_read_as_one_matrix_and_scaled_as_that(name, fan_out, fan_in):
    model = Everything()
    line = next(line for line in str(plan(model, RULES)).splitlines() if line.startswith(f"{name}.weight"))
    assert f" {fan_out}x{fan_in} " in line
    opt = schatten.Muon(model, lr=1.0, scale="mup", rules=RULES)
    assert opt.metrics()["effective_lr"][f"{name}.weight"] == pytest.approx(math.sqrt(fan_out / fan_in))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_is_stepped_as_its_flattened_matrix(kind):
    conv = kind(4, 6, 3, bias=False)
    flat = nn.Parameter(conv.weight.detach().flatten(1).clone())
    conv.weight.grad = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(0))
    flat.grad = conv.weight.grad.flatten(1).clone()
    for params in (conv, [flat]):
        schatten.Muon(params, lr=0.1, scale="keller").step()
    assert torch.equal(conv.weight.flatten(1), flat)


def test_a_module_used_twice_is_listed_once():
    layer = nn.Linear(4, 4)
    assert list(routes(nn.Sequential(layer, nn.ReLU(), layer))) == ["0.weight", "0.bias"]


def test_a_linear_that_shares_an_embedding_s_memory_is_no_hidden_matrix():
    # Tied through a view: another Parameter over the same storage.
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 10, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.data.view(10, 4))
    assert routes(model) == {"0.weight": "adamw", "1.weight": "spectral", "2.weight": "adamw"}
    assert reasons(model)["2.weight"] == "shares storage with the embedding 0.weight"


def test_frozen_parameters_are_counted_not_routed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    found = plan(model)
    assert [entry.name for entry in found] == ["1.weight", "1.bias"] and found.frozen == 2
    assert str(found).splitlines()[-1] == "frozen, not trained: 2 tensors"
    assert "frozen" not in str(plan(nn.Linear(4, 4)))
    assert [g["param_names"] for g in schatten.Muon(model).param_groups] == [["1.weight"], ["1.bias"]]


def test_a_frozen_weight_with_a_trained_bias_stays_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert routes(model) == {"0.bias": "adamw", "1.weight": "spectral", "1.bias": "adamw"}


def test_a_model_on_the_meta_device_has_the_plan_it_will_have():
    # All its tensors share address 0, which must not count as tying.
    for tie in (None, "head to table"):
        with torch.device("meta"):
            model = GPT(tie)
        assert plan(model) == plan(GPT(tie))


def test_a_plan_does_not_depend_on_values_or_mode():
    model = GPT()
    before = plan(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.eval().to(torch.bfloat16)
    assert plan(model) == before == plan(model)


@pytest.mark.parametrize(
    ("build", "rules"), [(GPT, ()), (Everything, RULES), (lambda: GPT("head to table"), ()), (lambda: nn.Linear(4, 4), ())]
)
def test_an_optimizer_has_the_plan_and_every_parameter_in_one_group(build, rules):
    model = build()
    opt = schatten.Muon(model, rules=rules)
    assert opt.plan == plan(model, rules)
    grouped = [(name, id(p)) for g in opt.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)]
    assert sorted(grouped) == sorted((name, id(p)) for name, p in model.named_parameters())
    algorithms = {name: g["algorithm"] for g in opt.param_groups for name in g["param_names"]}
    assert algorithms == {entry.name: entry.route for entry in opt.plan}
    assert [g["algorithm"] for g in opt.param_groups] == sorted((g["algorithm"] for g in opt.param_groups), reverse=True)


@pytest.mark.parametrize("rules", [[], RULES], ids=len)
def test_the_table_shows_every_parameter_and_adds_up(rules):
    found = plan(Everything(), rules, strict=False)
    header, ruler, *lines = str(found).splitlines()
    assert header.split()[:2] == ["parameter", "shape"] and set(ruler) == {"-", " "}
    assert len(found) == len(list(found)) == len(lines) - 2
    for entry, line in zip(found, lines, strict=False):
        assert line.startswith(entry.name + " ") and f" {entry.route} " in line and line.endswith(entry.reason)
        assert ("x".join(map(str, entry.shape)) or "scalar") in line
    for route in ("spectral", "adamw"):
        mine = [math.prod(e.shape) for e in found if e.route == route]
        assert f"{route}: {len(mine)} tensors, {sum(mine):,} parameters" in lines[-2:]
    assert len(found) == len(list(Everything().named_parameters()))


def test_a_plan_of_tensors_lists_them_too():
    W = nn.Parameter(torch.zeros(4, 6))
    named = schatten.Muon([("body", W)]).plan
    assert [(e.name, e.shape, e.route, e.layout, e.reason) for e in named] == [
        ("body", (4, 6), "spectral", "matrix", "passed in this group")
    ]
    assert [entry.name for entry in schatten.Muon([W]).plan] == ["0.0"]
