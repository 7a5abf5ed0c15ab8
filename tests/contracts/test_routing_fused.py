"""Fused projections of hand-written modules: cut where the module says how, asked about where it does not, whole otherwise."""

import pytest
import torch
from torch import nn

import schatten
from schatten import Layout, plan


def only(module, name="weight", **options):
    return next(e for e in plan(module, **options) if e.name == name)


class Block(nn.Module):
    """Attributes, and Linears by name and (rows, columns); the width of the model is 32."""

    def __init__(self, attributes, **children):
        super().__init__()
        for key, value in attributes.items():
            setattr(self, key, value)
        for key, (rows, columns) in children.items():
            setattr(self, key, nn.Linear(columns, rows, bias=False))


class Attention(Block):
    pass


HEADS = {"num_heads": 4}

GROUPED = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("attributes", "name", "rows", "layout"),
    [
        (HEADS, "qkv", 96, Layout("matrix", split=3)),
        (HEADS, "to_qkv", 96, Layout("matrix", split=3)),
        (HEADS, "c_attn", 96, Layout("matrix", split=3)),
        ({}, "qkv_proj", 96, Layout("matrix", split=3)),
        (GROUPED, "wqkv", 64, Layout("matrix", split=(32, 16, 16))),
        ({"n_head": 4, "n_kv_head": 1}, "c_attn", 48, Layout("matrix", split=(32, 8, 8))),
        # A config with other heads than this layer has: the rows decide.
        ({**GROUPED}, "qkv", 96, Layout("matrix", split=3)),
        (HEADS, "query_key_value", 96, Layout("matrix", split=3, groups=4)),
        ({**HEADS, "num_kv_heads": 2}, "query_key_value", 64, Layout("matrix", split=(16, 8, 8), groups=2)),
        ({**HEADS, "num_kv_heads": 1}, "query_key_value", 48, Layout("matrix", split=(32, 8, 8))),
        ({"num_heads": 4, "head_dim": 8}, "kv_proj", 64, Layout("matrix", split=2)),
        (HEADS, "k_proj", 32, "matrix"),
        (HEADS, "kv_latent", 48, "matrix"),
    ],
)
@pytest.mark.parametrize("in_config", [False, True], ids=["attributes", "config"])
def test_a_fused_projection_is_cut_by_what_the_module_says(attributes, name, rows, layout, in_config):
    if in_config:
        attributes = {"config": type("Config", (), attributes)()}
    module = Attention(attributes, **{name: (rows, 32)}, out_proj=(32, 32))
    entry = only(module, f"{name}.weight")
    assert (entry.route, entry.layout) == ("spectral", layout)
    assert entry.reason.startswith("hidden Linear" if layout == "matrix" else "fused ")


@pytest.mark.parametrize(
    ("attributes", "name", "rows", "suggested"),
    [
        # Rows that make no q, k and v of the heads there are, heads that are not there, and a name that says nothing.
        (GROUPED, "qkv", 80, "spectral"),
        ({}, "query_key_value", 96, "split=3"),
        (HEADS, "mix", 96, "split=3"),
    ],
)
def test_a_fused_projection_of_unknown_order_is_asked_about(attributes, name, rows, suggested):
    module = Attention(attributes, **{name: (rows, 32)}, out_proj=(32, 32))
    with pytest.raises(ValueError, match=f'"{name}.weight", "spectral".*fused q, k, v, in an order that Attention') as error:
        plan(module)
    assert suggested in str(error.value)
    entry = only(module, f"{name}.weight", rules=[(f"{name}.*", "spectral", Layout(split=2))])
    assert entry.layout == Layout("matrix", split=2)


def test_the_keys_and_values_of_cross_attention_are_two():
    module = Attention(HEADS, c_attn=(64, 32), q_attn=(32, 32), c_proj=(32, 32))
    assert only(module, "c_attn.weight").layout == Layout("matrix", split=2)
    assert only(module, "q_attn.weight").layout == "matrix"


def feed_forward(**children):
    return Block({}, **children)


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        (feed_forward(fc1=(48, 32), fc2=(32, 24)), Layout("matrix", split=2)),
        (feed_forward(w13=(48, 32)), Layout("matrix", split=2)),
        (feed_forward(gate_up_proj=(48, 32)), Layout("matrix", split=2)),
        (feed_forward(fc1=(48, 32), fc2=(32, 48)), "matrix"),
        # A layer between reads all of it; a layer before does not read it.
        (feed_forward(fc1=(48, 32), mid=(24, 48), fc2=(32, 24)), "matrix"),
        (feed_forward(fc2=(32, 24), fc1=(48, 32)), "matrix"),
        (feed_forward(in_proj=(96, 32), out_proj=(32, 32)), Layout("matrix", split=3)),
        (nn.Sequential(nn.Linear(32, 48), nn.GLU(), nn.Linear(24, 32)), Layout("matrix", split=2)),
        (nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), "matrix"),
        (nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.Linear(24, 32)), "matrix"),
    ],
)
def test_a_gated_unit_is_told_by_who_reads_its_halves(module, layout):
    name = next(n for n, _ in module.named_parameters() if n.split(".")[0] in ("fc1", "w13", "gate_up_proj", "in_proj", "0"))
    assert only(module, name).layout == layout


def test_a_gated_unit_that_a_norm_reads_whole_is_one_matrix():
    module = feed_forward(fc1=(48, 32))
    module.norm = nn.LayerNorm(48)
    module.fc2 = nn.Linear(24, 32)
    assert only(module, "fc1.weight").layout == "matrix"


def test_an_activation_of_the_user_s_own_between_the_layers_of_a_sequence():
    class GEGLU(nn.Module):
        pass

    module = nn.Sequential(nn.Linear(32, 48), GEGLU(), nn.Linear(24, 32))
    assert only(module, "0.weight").layout == Layout("matrix", split=2)


class Scanned(nn.Module):
    """Mamba's, with the names of the mamba_ssm package."""

    def __init__(self, second=False):
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank, self.nheads, self.ngroups = 64, 8, 4, 8, 2
        self.in_proj = nn.Linear(32, 168 if second else 128, bias=False)
        if not second:
            self.x_proj = nn.Linear(64, 20, bias=False)
        self.A_log = nn.Parameter(torch.zeros(8 if second else (64, 8)))
        self.out_proj = nn.Linear(64, 32, bias=False)


def test_mamba_of_either_package_is_cut_alike():
    assert only(Scanned(), "in_proj.weight").layout == Layout("matrix", split=2)
    assert only(Scanned(), "x_proj.weight").layout == Layout("matrix", split=(4, 8, 8))
    assert only(Scanned(True), "in_proj.weight").layout == Layout("matrix", split=(64, 64, 16, 16, 8))


def test_a_state_space_of_other_rows_is_asked_about():
    module = Scanned(True)
    module.ngroups = 1
    with pytest.raises(ValueError, match=r"in_proj.weight.*fused projection of a state space"):
        plan(module)


def test_a_config_that_refuses_to_answer_leaves_the_question_open():
    class Varying:
        def __getattr__(self, name):
            raise RuntimeError(f"{name} differs between layers")

    module = Attention({"config": Varying()}, kv_a_proj_with_mqa=(14, 32), o_proj=(32, 32))
    with pytest.raises(ValueError, match=r"kv_a_proj_with_mqa.weight.*fused latent, rotary key, in an order"):
        plan(module)


@pytest.mark.parametrize("name", ["q_proj", "wq", "query"])
def test_queries_twice_as_wide_as_values_are_one_matrix(name):
    # Of latent attention with 10 features of a query and 5 of a value in each head, the output reads half of the queries.
    sizes = {"num_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    assert only(Attention(sizes, **{name: (40, 32)}, o_proj=(32, 20)), f"{name}.weight").layout == "matrix"


def test_a_query_with_a_gate_for_each_head_is_cut():
    module = Attention({"num_heads": 4, "head_dim": 8}, q_proj=(64, 32), k_proj=(32, 32), o_proj=(32, 32))
    assert only(module, "q_proj.weight").layout == Layout("matrix", split=2, groups=4)
    module = Attention({"num_heads": 8, "head_dim": 8}, q_proj=(64, 32), k_proj=(32, 32), o_proj=(32, 64))
    assert only(module, "q_proj.weight").layout == "matrix"


def test_latent_attention_of_either_naming_is_cut_alike():
    sizes = {"n_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    module = Attention(sizes, wq=(40, 32), wkv_a=(14, 32), wkv_b=(44, 10), wo=(32, 20))
    assert only(module, "wkv_a.weight").layout == Layout("matrix", split=(10, 4))
    assert only(module, "wkv_b.weight").layout == Layout("matrix", split=(6, 5), groups=4)
    assert only(module, "wq.weight").layout == only(module, "wo.weight").layout == "matrix"


class Bank(nn.Module):
    """An expert bank by shapes alone: gate_up and down, or w1 and w2."""

    def __init__(self, shapes, **attributes):
        super().__init__()
        self.num_experts = 4
        for key, value in attributes.items():
            setattr(self, key, value)
        for key, shape in shapes.items():
            setattr(self, key, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("module", "layouts"),
    [
        (
            Bank({"gate_up_proj": (4, 48, 32), "down_proj": (4, 32, 24)}),
            [Layout("experts", split=2), "experts"],
        ),
        (
            Bank({"gate_up_proj": (4, 32, 48), "down_proj": (4, 24, 32)}),
            [Layout("experts", split=2, transpose=True), Layout("experts", transpose=True)],
        ),
        # gpt-oss 20b: as wide inside as out, so only the pair tells.
        (
            Bank({"gate_up_proj": (4, 32, 64), "down_proj": (4, 32, 32)}),
            [Layout("experts", split=2, transpose=True), Layout("experts", transpose=True)],
        ),
        (
            Bank({"gate_up_proj": (4, 32, 48), "down_proj": (4, 24, 32)}, is_concatenated=False),
            [Layout("experts", split=2, groups=24, transpose=True), Layout("experts", transpose=True)],
        ),
        (Bank({"w1": (4, 24, 32), "w2": (4, 32, 24)}, hidden_size=32), ["experts", "experts"]),
        (
            Bank({"w1": (4, 32, 24), "w2": (4, 24, 32)}, hidden_size=32),
            [Layout("experts", transpose=True), Layout("experts", transpose=True)],
        ),
        (
            Bank({"w1": (4, 32, 32), "w2": (4, 32, 32)}, is_transposed=True),
            [Layout("experts", transpose=True), Layout("experts", transpose=True)],
        ),
    ],
)
def test_the_axes_of_an_expert_bank_are_told_by_its_module(module, layouts):
    assert [e.layout for e in plan(module)] == layouts
    assert all(e.route == "spectral" for e in plan(module))


def test_a_bank_whose_axes_no_one_tells_is_asked_about():
    with pytest.raises(ValueError, match=r"may be \(experts, out, in\) or \(experts, in, out\)"):
        plan(Bank({"w1": (4, 32, 32), "w2": (4, 32, 32)}, hidden_size=32))


def test_every_layout_of_a_plan_reads_its_parameter_once():
    # Each entry of a weight is in one block: what a step moves is all of it.
    for module in (Scanned(), Scanned(True), nn.GRU(8, 16), nn.MultiheadAttention(8, 2)):
        params = dict(module.named_parameters())
        for entry in plan(module):
            if entry.route == "spectral":
                seen = torch.zeros(params[entry.name].shape)
                for piece in schatten.layout.pieces(entry.layout, entry.shape):
                    piece.view(seen).add_(1)
                assert torch.equal(seen, torch.ones_like(seen))
