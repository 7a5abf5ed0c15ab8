"""Matrices of modules that no one knows: one error names them all with rules to paste, and nothing else is left open."""

import re

import pytest
import torch
from torch import nn

import schatten
from schatten import plan


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(4, 6))
        self.bank = nn.Parameter(torch.zeros(3, 4, 6))
        self.grid = nn.Parameter(torch.zeros(2, 3, 4, 6))
        self.body = nn.Linear(4, 4)
        self.offset = nn.Parameter(torch.zeros(1, 1, 4))


def model():
    return nn.Sequential(Block(), Block())


UNKNOWN = [f"{i}.{name}" for i in range(2) for name in ("mix", "bank", "grid")]


def refusal(module, **options):
    with pytest.raises(ValueError, match="may be matrices or tables") as error:
        plan(module, **options)
    return str(error.value)


def rules_in(text):
    return eval("[" + "\n".join(text.splitlines()[1:]) + "\n]", {"schatten": schatten})


def test_all_of_them_are_listed_in_one_error():
    text = refusal(model())
    assert text.startswith("6 parameters of this model")
    lines = text.splitlines()[1:]
    assert [re.search(r'"(.*?)"', line).group(1) for line in lines] == UNKNOWN
    assert all("Block." in line and "is of no known kind" in line for line in lines)
    assert [re.search(r"# (\S+):", line).group(1) for line in lines[:3]] == ["4x6", "3x4x6", "2x3x4x6"]


def test_its_rules_can_be_pasted_and_then_the_plan_is_complete():
    found = {e.name: (e.route, e.layout) for e in plan(model(), rules=rules_in(refusal(model())))}
    assert [found[name] for name in UNKNOWN[:3]] == [("spectral", "matrix"), ("spectral", "experts"), ("spectral", "conv")]
    assert found["0.body.weight"] == ("spectral", "matrix") and found["0.offset"] == ("adamw", "-")


def test_a_rule_for_some_leaves_the_others_in_the_error():
    text = refusal(model(), rules=[("*.mix", "spectral"), ("0.*", "adamw")])
    assert [rule[0] for rule in rules_in(text)] == ["1.bank", "1.grid"]
    assert text.startswith("2 parameters") and refusal(nn.Sequential(Block()), rules=[("*.[bg]*", "adamw")]).startswith(
        "1 param"
    )


def test_a_rule_that_only_sets_options_does_not_say_the_route():
    assert len(rules_in(refusal(model(), rules=[("*", "auto", {"lr": 1.0})]))) == 6


def test_without_strict_they_go_to_adamw_with_that_reason():
    found = {e.name: e for e in plan(model(), strict=False)}
    for name in UNKNOWN:
        assert found[name].route == "adamw"
        assert found[name].reason == f"Block.{name[2:]} is of no known kind: add a rule if it is a matrix"
    assert found["1.body.weight"].route == "spectral"


def test_an_optimizer_asks_unless_told_not_to():
    with pytest.raises(ValueError, match="6 parameters of this model may be matrices or tables"):
        schatten.Muon(model())
    assert schatten.Muon(model(), strict=False).plan == plan(model(), strict=False)


def test_where_all_tensors_have_the_same_rule_nothing_is_open():
    found = {e.name: (e.route, e.layout) for e in plan(model(), others="spectral")}
    assert all(found[name] == ("spectral", "flat") for name in UNKNOWN)


def test_frozen_parameters_are_not_asked_about():
    module = model()
    for name, p in module.named_parameters():
        p.requires_grad_(name not in UNKNOWN)
    assert all("known" not in e.reason for e in plan(module))


@pytest.mark.parametrize("shape", [(5,), (), (1, 5), (1, 1, 5), (5, 1), (1,), (1, 1)], ids=str)
def test_what_has_one_long_side_at_most_is_a_vector_and_no_question(shape):
    module = nn.Linear(4, 4)
    module.extra = nn.Parameter(torch.zeros(shape))
    entry = {e.name: e for e in plan(module)}["extra"]
    assert entry.route == "adamw" and entry.reason in ("scalar", "vector (Linear.extra)")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pos_embed", "position table"),
        ("position_embeddings", "position table"),
        ("relative_position_bias_table", "bias"),
        ("rel_pos_h", "position table"),
        ("cls_token", "table of vectors"),
        ("query_tokens", "table of vectors"),
        ("latents", "table of vectors"),
        ("codebook", "table of vectors"),
        ("embedding", "table of vectors"),
        ("gate_up_proj_bias", "bias"),
        ("pos_bias_u", "bias"),
        ("layer_scale", "gains"),
        ("gamma", "gains"),
        ("A_log", "state decay"),
        ("time_decay", "state decay"),
        # Names of projections, and names that only contain such a word.
        ("embedding_projection", None),
        ("position_kernel", None),
        ("pose", None),
        ("proj", None),
        ("weight", None),
        ("query", None),
        ("tokenwise", None),
        ("A", "state decay"),
        ("AB", None),
    ],
)
def test_a_parameter_a_module_holds_itself_goes_by_its_name(name, reason):
    module = nn.Module()
    module.body = nn.Linear(4, 4)
    setattr(module, name, nn.Parameter(torch.zeros(6, 8)))
    if reason is None:
        assert rules_in(refusal(module)) == [(name, "spectral")]
    else:
        assert {e.name: e for e in plan(module)}[name].reason == f"{reason} (Module.{name})"


def test_a_parameter_list_goes_by_its_own_name():
    module = nn.Module()
    module.body = nn.Linear(4, 4)
    module.prompts = nn.ParameterList([nn.Parameter(torch.zeros(6, 8))])
    assert {e.name: e.route for e in plan(module)}["prompts.0"] == "adamw"
    module.mixers = nn.ParameterList([nn.Parameter(torch.zeros(6, 8))])
    assert rules_in(refusal(module)) == [("mixers.0", "spectral")]


def test_row_2_and_8_a_model_without_a_spectral_matrix_is_refused():
    # DeepSpeed PR 8438, LlamaFactory 8041: zero matrices were tagged, and all of it trained by AdamW.
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Parameter(torch.zeros(64))

    with pytest.raises(ValueError, match="No parameter of this model is routed to a spectral rule"):
        plan(Wrapped())
    with pytest.raises(ValueError, match="No parameter of this model"):
        schatten.Muon(nn.Linear(4, 4), rules=[("weight", "adamw")])


def test_row_10_a_fused_weight_is_found_by_its_module_and_a_stale_pattern_raises():
    # torchtitan PR 4812: a pattern for w1 and w3 no longer matched when they became w13, and it trained by AdamW.
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.w13 = nn.Linear(8, 24)
            self.w2 = nn.Linear(12, 8)

    found = {e.name: e for e in plan(FeedForward())}
    assert (found["w13.weight"].route, found["w13.weight"].layout) == ("spectral", schatten.Layout("matrix", split=2))
    with pytest.raises(ValueError, match=r"Rule '\*\.w\[13\]\.weight' matches no parameter"):
        plan(FeedForward(), rules=[("*.w[13].weight", "spectral")])


def test_row_13_an_expert_bank_of_any_name_is_a_batch_or_a_question():
    # maxtext 4798: under another name the expert axis was read as a side of the matrix.
    class Experts(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.num_experts, self.hidden_size = 4, 8
            setattr(self, name, nn.Parameter(torch.zeros(4, 12, 8)))

    for name in ("w1", "up_proj", "w1_weight"):
        (entry,) = plan(Experts(name))
        assert (entry.route, entry.layout, entry.reason) == ("spectral", "experts", "expert bank")
    assert rules_in(refusal(Experts("mystery"))) == [("mystery", "spectral", "experts")]
