"""The plans of well-known modules, printed as a user sees them: a change of routing shows here as a change of a table.

Recorded, not endorsed: a fused in_proj_weight, Hugging Face's Conv1D and LoRA factors wait for layouts of their own.
"""

import importlib.util
from textwrap import dedent

import pytest
from torch import nn

import schatten

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install schatten[hf]"
)

SMALL = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}


def attention():
    return nn.MultiheadAttention(8, 2)


def attention_with_other_widths():
    return nn.MultiheadAttention(8, 2, kdim=6, vdim=4)


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, **SMALL))


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **SMALL, **options))


def tied_llama():
    return llama(tie_word_embeddings=True)


ATTENTION = """
    parameter        shape  route     read as  reason
    ---------------  -----  --------  -------  -----------------------------------------------------------------------------------
    in_proj_weight   24x8   adamw     -        MultiheadAttention.in_proj_weight is of no known kind: add a rule if it is a matrix
    in_proj_bias     24     adamw     -        bias
    out_proj.weight  8x8    spectral  8x8      hidden Linear
    out_proj.bias    8      adamw     -        bias
    spectral: 1 tensors, 64 parameters
    adamw: 3 tensors, 224 parameters
"""  # noqa: E501

ATTENTION_WITH_OTHER_WIDTHS = """
    parameter        shape  route     read as  reason
    ---------------  -----  --------  -------  ----------------------------------------------------------------------------------
    q_proj_weight    8x8    adamw     -        MultiheadAttention.q_proj_weight is of no known kind: add a rule if it is a matrix
    k_proj_weight    8x6    adamw     -        MultiheadAttention.k_proj_weight is of no known kind: add a rule if it is a matrix
    v_proj_weight    8x4    adamw     -        MultiheadAttention.v_proj_weight is of no known kind: add a rule if it is a matrix
    in_proj_bias     24     adamw     -        bias
    out_proj.weight  8x8    spectral  8x8      hidden Linear
    out_proj.bias    8      adamw     -        bias
    spectral: 1 tensors, 64 parameters
    adamw: 5 tensors, 176 parameters
"""  # noqa: E501

ENCODER_LAYER = """
    parameter                  shape  route     read as  reason
    -------------------------  -----  --------  -------  -----------------------------------------------------------------------------------
    self_attn.in_proj_weight   24x8   adamw     -        MultiheadAttention.in_proj_weight is of no known kind: add a rule if it is a matrix
    self_attn.in_proj_bias     24     adamw     -        bias
    self_attn.out_proj.weight  8x8    spectral  8x8      hidden Linear
    self_attn.out_proj.bias    8      adamw     -        bias
    linear1.weight             16x8   spectral  16x8     hidden Linear
    linear1.bias               16     adamw     -        bias
    linear2.weight             8x16   spectral  8x16     hidden Linear
    linear2.bias               8      adamw     -        bias
    norm1.weight               8      adamw     -        norm weight (LayerNorm)
    norm1.bias                 8      adamw     -        norm bias (LayerNorm)
    norm2.weight               8      adamw     -        norm weight (LayerNorm)
    norm2.bias                 8      adamw     -        norm bias (LayerNorm)
    spectral: 3 tensors, 320 parameters
    adamw: 9 tensors, 280 parameters
"""  # noqa: E501

GPT2 = """
    parameter                           shape  route  read as  reason
    ----------------------------------  -----  -----  -------  ---------------------------------------------------------------
    transformer.wte.weight              32x8   adamw  -        embedding, tied with lm_head.weight
    transformer.wpe.weight              16x8   adamw  -        embedding
    transformer.h.0.ln_1.weight         8      adamw  -        norm weight (LayerNorm)
    transformer.h.0.ln_1.bias           8      adamw  -        norm bias (LayerNorm)
    transformer.h.0.attn.c_attn.weight  8x24   adamw  -        Conv1D.weight is of no known kind: add a rule if it is a matrix
    transformer.h.0.attn.c_attn.bias    24     adamw  -        bias
    transformer.h.0.attn.c_proj.weight  8x8    adamw  -        Conv1D.weight is of no known kind: add a rule if it is a matrix
    transformer.h.0.attn.c_proj.bias    8      adamw  -        bias
    transformer.h.0.ln_2.weight         8      adamw  -        norm weight (LayerNorm)
    transformer.h.0.ln_2.bias           8      adamw  -        norm bias (LayerNorm)
    transformer.h.0.mlp.c_fc.weight     8x32   adamw  -        Conv1D.weight is of no known kind: add a rule if it is a matrix
    transformer.h.0.mlp.c_fc.bias       32     adamw  -        bias
    transformer.h.0.mlp.c_proj.weight   32x8   adamw  -        Conv1D.weight is of no known kind: add a rule if it is a matrix
    transformer.h.0.mlp.c_proj.bias     8      adamw  -        bias
    transformer.ln_f.weight             8      adamw  -        norm weight (LayerNorm)
    transformer.ln_f.bias               8      adamw  -        norm bias (LayerNorm)
    spectral: 0 tensors, 0 parameters
    adamw: 16 tensors, 1,272 parameters
"""

LLAMA = """
    parameter                                       shape  route     read as  reason
    ----------------------------------------------  -----  --------  -------  --------------------------------------------------------------------
    model.embed_tokens.weight                       32x8   adamw     -        embedding
    model.layers.0.self_attn.q_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.k_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.v_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.o_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.mlp.gate_proj.weight             12x8   spectral  12x8     hidden Linear
    model.layers.0.mlp.up_proj.weight               12x8   spectral  12x8     hidden Linear
    model.layers.0.mlp.down_proj.weight             8x12   spectral  8x12     hidden Linear
    model.layers.0.input_layernorm.weight           8      adamw     -        vector (LlamaRMSNorm.weight)
    model.layers.0.post_attention_layernorm.weight  8      adamw     -        vector (LlamaRMSNorm.weight)
    model.norm.weight                               8      adamw     -        vector (LlamaRMSNorm.weight)
    lm_head.weight                                  32x8   adamw     -        output head: Linear onto the vocabulary of model.embed_tokens.weight
    spectral: 7 tensors, 544 parameters
    adamw: 5 tensors, 536 parameters
"""  # noqa: E501

TIED_LLAMA = """
    parameter                                       shape  route     read as  reason
    ----------------------------------------------  -----  --------  -------  -----------------------------------
    model.embed_tokens.weight                       32x8   adamw     -        embedding, tied with lm_head.weight
    model.layers.0.self_attn.q_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.k_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.v_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.self_attn.o_proj.weight          8x8    spectral  8x8      hidden Linear
    model.layers.0.mlp.gate_proj.weight             12x8   spectral  12x8     hidden Linear
    model.layers.0.mlp.up_proj.weight               12x8   spectral  12x8     hidden Linear
    model.layers.0.mlp.down_proj.weight             8x12   spectral  8x12     hidden Linear
    model.layers.0.input_layernorm.weight           8      adamw     -        vector (LlamaRMSNorm.weight)
    model.layers.0.post_attention_layernorm.weight  8      adamw     -        vector (LlamaRMSNorm.weight)
    model.norm.weight                               8      adamw     -        vector (LlamaRMSNorm.weight)
    spectral: 7 tensors, 544 parameters
    adamw: 4 tensors, 280 parameters
"""

GOLDEN = [
    pytest.param(attention, ATTENTION, id="MultiheadAttention"),
    pytest.param(attention_with_other_widths, ATTENTION_WITH_OTHER_WIDTHS, id="MultiheadAttention of other widths"),
    pytest.param(encoder_layer, ENCODER_LAYER, id="TransformerEncoderLayer"),
    pytest.param(llama, LLAMA, id="Llama", marks=needs_transformers),
    pytest.param(tied_llama, TIED_LLAMA, id="tied Llama", marks=needs_transformers),
]


@pytest.mark.parametrize(("build", "table"), GOLDEN)
def test_the_plan_is_the_recorded_one(build, table):
    assert str(schatten.plan(build())) == dedent(table).strip()


@pytest.mark.parametrize(("build", "table"), GOLDEN)
def test_an_optimizer_of_the_module_trains_every_parameter(build, table):
    model = build()
    opt = schatten.Muon(model)
    assert str(opt.plan) == dedent(table).strip()
    assert sum(len(g["params"]) for g in opt.param_groups) == len(list(model.parameters()))


@needs_transformers
def test_a_gpt2_of_conv1d_is_refused_with_its_plan_until_a_rule_names_its_matrices():
    with pytest.raises(ValueError, match="No parameter of this model is routed to a spectral rule") as error:
        schatten.plan(gpt2())
    assert str(error.value).split("\n", 1)[1] == dedent(GPT2).strip()
    found = schatten.plan(gpt2(), rules=[("transformer.h.*.c_*.weight", "spectral")])
    spectral = [entry.name.removeprefix("transformer.h.0.") for entry in found if entry.route == "spectral"]
    assert spectral == ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
