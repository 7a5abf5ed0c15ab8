"""Where routers, depthwise filters, LoRA's factors, skinny matrices and heads go by default, and that a rule overrides it.

docs/routing.md gives the reasons.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from schatten import Layout, plan
from tests.facts.routing_models import NanoGPT


def entries(model, **options):
    return {e.name: e for e in plan(model, **options)}


class Holder(nn.Module):
    """Children by name beside a hidden Linear."""

    def __init__(self, **children):
        super().__init__()
        self.body = nn.Linear(8, 8)
        for name, child in children.items():
            setattr(self, name, child)


# -- skinny matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 8), (8, 1), (8, 3), (3, 3)])
def test_a_matrix_of_fewer_than_four_rows_or_columns_trains_by_adamw(rows, columns):
    entry = entries(Holder(layer=nn.Linear(columns, rows)))["layer.weight"]
    assert (entry.route, entry.reason) == ("adamw", f"skinny, {rows}x{columns}: hidden Linear")
    assert (
        entries(Holder(layer=nn.Linear(columns, rows)), rules=[("layer.weight", "spectral")])["layer.weight"].route
        == "spectral"
    )


def test_four_rows_are_enough_and_it_is_the_logical_matrix_that_counts():
    assert entries(Holder(layer=nn.Linear(8, 4)))["layer.weight"].route == "spectral"
    # 8 x 9 in all, 4 groups of 2 x 18.
    entry = entries(Holder(layer=nn.Conv2d(8, 8, 3, groups=4)))["layer.weight"]
    assert (entry.route, entry.reason) == ("adamw", "skinny, 2x18: hidden convolution, 4 groups")
    # 9 rows that are 3 gates of 3.
    assert entries(Holder(layer=nn.GRU(8, 3)))["layer.weight_ih_l0"].reason == "skinny, 3x8: 3 gates (GRU)"
    # 3 channels of 7 x 7 are a fan_in of 147.
    assert entries(Holder(layer=nn.Conv2d(3, 8, 7)))["layer.weight"].route == "spectral"


# -- convolutions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 7, groups=8), nn.Conv1d(8, 16, 4, groups=8), nn.ConvTranspose2d(8, 16, 4, groups=8)]
)
def test_depthwise_filters_train_by_adamw_unless_a_rule_says_otherwise(layer):
    entry = entries(Holder(layer=layer))["layer.weight"]
    assert (entry.route, entry.reason) == ("adamw", "depthwise convolution")
    flat = entries(Holder(layer=layer), rules=[("layer.weight", "spectral", "conv")])["layer.weight"]
    assert (flat.route, flat.layout) == ("spectral", "conv")


def test_a_grouped_convolution_is_a_matrix_for_each_group():
    found = entries(Holder(layer=nn.Conv2d(16, 32, 3, groups=4), up=nn.ConvTranspose2d(16, 8, 4, groups=2)))
    assert found["layer.weight"].layout == Layout("conv", heads=4)
    assert found["up.weight"].layout == Layout("conv", heads=2, axis="fan_in", transpose=True)


def test_one_input_channel_of_one_group_is_no_depthwise_filter():
    assert entries(Holder(layer=nn.Conv2d(1, 8, 7)))["layer.weight"].route == "spectral"


# -- routers -----------------------------------------------------------------------------------------------------------


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 8))


class MoEGate(TopKRouter):
    pass


class Mixture(nn.Module):
    """Experts as a list, their gate a Linear: Mixtral's of older versions of transformers."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Mixture(), "gate.weight"),
        (TopKRouter(), "weight"),
        (MoEGate(), "weight"),
        (nn.ModuleDict({"router": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))}), "router.1.weight"),
    ],
    ids=["gate beside experts", "by class", "by another class", "by name"],
)
def test_routers_train_by_adamw_unless_a_rule_says_otherwise(module, name):
    entry = entries(Holder(moe=module))[f"moe.{name}"]
    assert entry.route == "adamw" and entry.reason.startswith("router (")
    assert entries(Holder(moe=module), rules=[(f"moe.{name}", "spectral")])[f"moe.{name}"].layout == "matrix"


def test_a_gate_without_experts_is_a_hidden_matrix():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 16)
            self.down = nn.Linear(16, 8)

    assert entries(Gated())["gate.weight"].route == "spectral"


# -- LoRA --------------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """kohya's names."""

    def __init__(self, rank=4):
        super().__init__()
        self.lora_down = nn.Linear(32, rank, bias=False)
        self.lora_up = nn.Linear(rank, 32, bias=False)


def test_of_lora_b_is_orthogonalised_and_a_is_not():
    found = entries(Holder(unet=Adapted()))
    assert (found["unet.lora_down.weight"].route, found["unet.lora_down.weight"].reason) == ("adamw", "LoRA A")
    assert (found["unet.lora_up.weight"].route, found["unet.lora_up.weight"].reason) == ("spectral", "LoRA B")
    both = entries(Holder(unet=Adapted()), rules=[("*lora_*", "spectral")])
    assert both["unet.lora_down.weight"].layout == both["unet.lora_up.weight"].layout == "matrix"


def test_an_adapted_layer_that_is_trained_itself_is_cut_as_before():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(NanoGPT(), peft.LoraConfig(r=4, target_modules=["c_attn"]))
    model.requires_grad_(True)
    found = {e.name.removeprefix("base_model.model.transformer.h.0.attn."): e for e in plan(model)}
    assert found["c_attn.base_layer.weight"].layout == found["c_attn.lora_B.default.weight"].layout == Layout("matrix", split=3)


def test_lora_of_rank_below_four_is_skinny():
    assert entries(Holder(unet=Adapted(rank=2)))["unet.lora_up.weight"].reason == "skinny, 32x2: LoRA B"


def test_lora_of_convolutions():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_down = nn.Conv2d(8, 4, 3, bias=False)
            self.lora_up = nn.Conv2d(4, 8, 1, bias=False)

    found = entries(Holder(unet=Adapter()))
    assert found["unet.lora_down.weight"].route == "adamw"
    assert (found["unet.lora_up.weight"].route, found["unet.lora_up.weight"].layout) == ("spectral", "conv")


# -- parametrizations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm, orthogonal])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3)], ids=["Linear", "Conv2d"])
def test_a_parametrized_weight_is_what_it_was_and_its_magnitude_a_vector(parametrize, layer):
    torch.manual_seed(0)
    found = entries(Holder(layer=parametrize(layer())))
    own = {e.name.rpartition(".")[2]: (e.route, e.reason) for e in found.values() if "parametrizations" in e.name}
    kind = ("spectral", "hidden Linear" if isinstance(layer(), nn.Linear) else "hidden convolution")
    if parametrize is weight_norm:
        assert own == {"original0": ("adamw", "magnitude of a weight norm"), "original1": kind}
    else:
        assert own == {"original": kind}


# -- layers like Linear ------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A layer of another library: its sizes say what it is."""

    def __init__(self, shape, **sizes):
        super().__init__()
        for name, value in sizes.items():
            setattr(self, name, value)
        self.weight = nn.Parameter(torch.zeros(shape))


def test_a_layer_that_has_the_sizes_of_a_linear_is_one():
    found = entries(Holder(layer=Foreign((6, 8), out_features=6, in_features=8)))["layer.weight"]
    assert (found.route, found.layout, found.reason) == ("spectral", "matrix", "hidden Foreign")
    found = entries(Holder(layer=Foreign((8, 6), output_size=6, input_size=8)))["layer.weight"]
    assert (found.route, found.layout) == ("spectral", Layout("matrix", transpose=True))
    with pytest.raises(ValueError, match=r"Foreign\.weight is of no known kind"):
        plan(Holder(layer=Foreign((6, 8), out_features=5, in_features=8)))


def test_a_layer_that_has_the_sizes_of_an_embedding_is_a_table():
    found = entries(Holder(layer=Foreign((20, 8), num_embeddings=20, embedding_dim=8)))["layer.weight"]
    assert (found.route, found.reason) == ("adamw", "embedding")


def test_a_layer_named_an_embedding_is_a_table():
    class QuantEmbedding(Foreign):
        pass

    assert entries(Holder(layer=QuantEmbedding((20, 8))))["layer.weight"].reason == "embedding"


def test_a_norm_of_any_name_is_a_norm():
    class HeadwiseRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))

    assert entries(Holder(q=HeadwiseRMSNorm()))["q.weight"].reason == "norm weight (HeadwiseRMSNorm)"


# -- heads -------------------------------------------------------------------------------------------------------------


def model(**children):
    """A trunk of two layers and then the children."""
    return nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), **children})


def head_names(module):
    return [e.name for e in plan(module) if e.reason.startswith("output head")]


@pytest.mark.parametrize(
    "name", ["head", "fc", "classifier", "score", "lm_head", "logits", "mlm_head", "cls_classifier", "output"]
)
def test_the_last_layer_is_a_head_by_its_name(name):
    assert head_names(model(**{name: nn.Linear(8, 10)})) == [f"{name}.weight"]


@pytest.mark.parametrize("name", ["fc", "output", "linear"])
def test_a_name_that_hidden_layers_have_too_is_a_head_at_the_end_only(name):
    assert head_names(model(**{name: nn.Linear(8, 8), "more": nn.Linear(8, 10)})) == []


@pytest.mark.parametrize("name", ["last", "fc1", "out_proj", "header", "forehead"])
def test_a_last_layer_by_another_name_is_hidden(name):
    assert head_names(model(**{name: nn.Linear(8, 10)})) == []


def test_of_a_head_with_layers_the_last_is_the_head():
    head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    assert head_names(model(classifier=head)) == ["classifier.2.weight"]


def test_every_head_of_a_dictionary_is_one_and_heads_of_attention_are_not():
    class AttentionHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.value = nn.Linear(8, 4), nn.Linear(8, 4)

    tasks = nn.ModuleDict({"a": nn.Linear(8, 10), "b": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))})
    assert head_names(model(heads=tasks)) == ["heads.a.weight", "heads.b.2.weight"]
    assert head_names(model(heads=nn.ModuleList([AttentionHead(), AttentionHead()]))) == []


def test_a_head_that_a_later_layer_reads_is_hidden():
    assert head_names(model(head=nn.Linear(8, 12), classifier=nn.Linear(12, 10))) == ["classifier.weight"]


def test_a_head_of_a_part_of_the_model_is_hidden():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    assert head_names(nn.ModuleDict({"a": Block(), "b": Block()})) == []


def test_a_convolution_can_be_a_head():
    assert head_names(model(classifier=nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 10, 1)))) == ["classifier.1.weight"]


class Trunk(nn.Module):
    """A model of 20 tokens with a head padded to 24 rows, which neither its name nor its shape tells."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.onto = nn.Linear(8, 24, bias=False)
        self.layers = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8))


class Transformer(Trunk):
    def get_output_embeddings(self):
        return self.onto


class Timm(Trunk):
    def get_classifier(self):
        return self.onto


class Headless(Trunk):
    """A trunk that has inherited the method from its models with a head."""

    def get_output_embeddings(self):
        raise NotImplementedError

    def get_classifier(self):
        return self.lm_head


@pytest.mark.parametrize("kind", [Transformer, Timm])
def test_a_head_is_the_one_the_model_names(kind):
    assert head_names(kind()) == ["onto.weight"]
    assert entries(kind())["onto.weight"].reason == f"output head of {kind.__name__}"
    assert head_names(nn.ModuleDict({"net": kind(), "value": nn.Linear(8, 8)})) == ["net.onto.weight"]
    assert head_names(Trunk()) == head_names(Headless()) == []


def test_input_embeddings_of_a_class_of_their_own_are_a_table():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(20, 8))

    class Model(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.table, self.body = table, nn.Linear(8, 8)

        def get_input_embeddings(self):
            return self.table

    assert entries(Model(Table()))["table.weight"].reason == "embedding"
    # A vision model's are a projection of patches.
    assert entries(Model(nn.Linear(20, 8)))["table.weight"].reason == "hidden Linear"
    assert entries(Model(nn.Conv2d(3, 8, 4)))["table.weight"].reason == "hidden convolution"


def test_the_last_layer_with_as_many_rows_as_labels_is_a_head():
    module = model(onto=nn.Linear(8, 10))
    module.num_classes = 10
    assert head_names(module) == ["onto.weight"]
    module.num_classes = 11
    assert head_names(module) == []


def test_a_head_can_be_trained_by_the_spectral_rule_if_a_rule_says_so():
    assert entries(model(head=nn.Linear(8, 10)), rules=[("head.weight", "spectral")])["head.weight"].route == "spectral"
