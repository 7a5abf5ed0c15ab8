"""The rows a plan calls value, gate or up are those that the model's own code uses as such.

A part of a fused weight is set to zero through the plan's layout, and the module is run: without its values an attention
returns zero, without its up or its gate rows so does a gated unit. A wrong order of rows leaves something.
"""

from importlib.util import find_spec

import pytest
import torch

import schatten
from schatten.layout import pieces
from tests.facts import routing_models as models

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


def part(entry, p, index):
    """A view of the part `index` of a split weight, in the order of the split."""
    for piece in pieces(entry.layout, entry.shape, entry.name):
        if index < piece.parts:
            lead = p.ndim - 2 if piece.layout.kind == "experts" else 0
            return piece.view(p).select(lead, index)
        index -= piece.parts
    raise IndexError(index)


def outputs(model, module, run):
    """What the module returns while `run` is called."""
    kept = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        run(model)
    handle.remove()
    out = kept[0]
    return out[0] if isinstance(out, tuple) else out


def tokens(model):
    return model(input_ids=torch.arange(6).view(1, 6) + 3)


def spectrogram(model):
    return model(torch.randn(1, 40, generator=torch.Generator().manual_seed(0)))


# (model, weight, which parts, alone, make the module's output zero, the module, how the model is run)
CASES = {
    "gpt2": (models.gpt2, "transformer.h.0.attn.c_attn.weight", {2}, "transformer.h.0.attn", tokens),
    "gpt_neox": (
        *(models.gpt_neox, "gpt_neox.layers.0.attention.query_key_value.weight"),
        *({2}, "gpt_neox.layers.0.attention", tokens),
    ),
    "bloom": (
        *(models.bloom, "transformer.h.0.self_attention.query_key_value.weight"),
        *({2}, "transformer.h.0.self_attention.dense", tokens),
    ),
    "falcon 7b": (
        *(models.falcon_7b, "transformer.h.0.self_attention.query_key_value.weight"),
        *({2}, "transformer.h.0.self_attention", tokens),
    ),
    "falcon 40b": (
        *(models.falcon_40b, "transformer.h.0.self_attention.query_key_value.weight"),
        *({2}, "transformer.h.0.self_attention", tokens),
    ),
    "gpt_bigcode": (models.gpt_bigcode, "transformer.h.0.attn.c_attn.weight", {2}, "transformer.h.0.attn", tokens),
    "gpt_bigcode by head": (
        *(lambda: models.gpt_bigcode(multi_query=False), "transformer.h.0.attn.c_attn.weight"),
        *({2}, "transformer.h.0.attn", tokens),
    ),
    "codegen": (models.codegen, "transformer.h.0.attn.qkv_proj.weight", {1}, "transformer.h.0.attn", tokens),
    "phi3": (models.phi3, "model.layers.0.self_attn.qkv_proj.weight", {2}, "model.layers.0.self_attn", tokens),
    "phi3 mlp": (models.phi3, "model.layers.0.mlp.gate_up_proj.weight", {0, 1}, "model.layers.0.mlp", tokens),
    "dbrx": (
        *(models.dbrx, "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"),
        *({2}, "transformer.blocks.0.norm_attn_norm.attn", tokens),
    ),
    "modern_bert": (models.modern_bert, "model.layers.0.attn.Wqkv.weight", {2}, "model.layers.0.attn", tokens),
    "modern_bert mlp": (models.modern_bert, "model.layers.0.mlp.Wi.weight", {0, 1}, "model.layers.0.mlp", tokens),
    "deepseek": (models.deepseek_v3, "model.layers.0.self_attn.kv_b_proj.weight", {1}, "model.layers.0.self_attn", tokens),
    "mixtral": (models.mixtral, "model.layers.0.mlp.experts.gate_up_proj", {0, 1}, "model.layers.0.mlp", tokens),
    # Its units are gate * sigmoid(gate) * (up + 1).
    "gpt_oss": (models.gpt_oss, "model.layers.0.mlp.experts.gate_up_proj", {0}, "model.layers.0.mlp", tokens),
    "llama4": (
        *(models.llama4, "model.layers.0.feed_forward.experts.gate_up_proj"),
        *({0, 1}, "model.layers.0.feed_forward.experts", tokens),
    ),
    "mamba": (models.mamba, "backbone.layers.0.mixer.in_proj.weight", {0, 1}, "backbone.layers.0.mixer", tokens),
    "mamba2": (models.mamba2, "backbone.layers.0.mixer.in_proj.weight", {0, 1}, "backbone.layers.0.mixer", tokens),
    "qwen3_next": (
        *(models.qwen3_next, "model.layers.0.linear_attn.in_proj_qkvz.weight"),
        *({0, 1, 2, 3}, "model.layers.0.linear_attn", tokens),
    ),
    "conformer": (
        *(models.wav2vec2_conformer, "wav2vec2_conformer.encoder.layers.0.conv_module.pointwise_conv1.weight"),
        *({0}, "wav2vec2_conformer.encoder.layers.0.conv_module.glu", spectrogram),
    ),
}


@needs_transformers
@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_fused_weight_are_those_the_model_uses(case):
    build, name, silencing, module, run = CASES[case]
    torch.manual_seed(0)
    model = build().eval()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for n, p in weights.items():
            # Biases would add to the zero that is looked for; the rest is large enough to be told from it.
            p.zero_() if n.endswith("bias") else p.normal_() if n == name else None
    entry = {entry.name: entry for entry in schatten.plan(model)}[name]
    assert entry.route == "spectral"
    W = weights[name]
    whole, parts = W.detach().clone(), sum(piece.parts for piece in pieces(entry.layout, entry.shape))
    assert outputs(model, module, run).abs().max() > 0
    found = set()
    for index in range(parts):
        with torch.no_grad():
            W.copy_(whole)
            part(entry, W, index).zero_()
        if outputs(model, module, run).abs().max() == 0:
            found.add(index)
    assert found == silencing
