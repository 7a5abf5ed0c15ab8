"""Small models of the families people train, for the golden tables: random weights, no download.

`python -m tests.facts.routing_models` writes the tables of all of them into golden/; read the difference before it is kept.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Grouped-query attention: 4 query heads and 2 key and value heads of 8.
LAYERS = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def gpt2(**options) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=4, n_embd=32, n_positions=16, **TOKENS, **options))


def gpt2_classifier() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_head=4, n_embd=32, n_positions=16, num_labels=5, **TOKENS))


def llama(**options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LAYERS, **TOKENS, **options))


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def llama_trunk() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**LAYERS, **TOKENS))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**LAYERS, **TOKENS))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**LAYERS, **TOKENS))


def qwen3_next() -> nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    options = {
        **LAYERS,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    return Qwen3NextForCausalLM(Qwen3NextConfig(**options, **TOKENS))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**LAYERS, num_local_experts=8, num_experts_per_tok=2, **TOKENS))


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**LAYERS, **experts, num_experts_per_tok=2, **TOKENS))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**LAYERS, num_local_experts=8, num_experts_per_tok=2, **TOKENS))


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    experts = {"num_local_experts": 8, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**LAYERS, **experts, **TOKENS))


def dbrx() -> nn.Module:
    from transformers import DbrxConfig, DbrxForCausalLM

    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    feed_forward = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 16}
    return DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=feed_forward, **TOKENS))


def granite_moe() -> nn.Module:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    options = {k: v for k, v in LAYERS.items() if k != "head_dim"}
    return GraniteMoeForCausalLM(GraniteMoeConfig(**options, num_local_experts=8, num_experts_per_tok=2, **TOKENS))


def deepseek_v3() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    options = {**LAYERS, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 4}
    experts = {"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
    latent = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**options, **experts, **latent, num_experts_per_tok=2, **TOKENS))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **TOKENS))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=4, **TOKENS))


def falcon_7b() -> nn.Module:
    """One key and value head for all."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, multi_query=True, new_decoder_architecture=False, **TOKENS))


def falcon_40b() -> nn.Module:
    """Groups of query heads, each stored with its key and value."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2}
    return FalconForCausalLM(FalconConfig(**sizes, new_decoder_architecture=True, **TOKENS))


def gpt_bigcode(multi_query: bool = True) -> nn.Module:
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 16}
    return GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes, multi_query=multi_query, **TOKENS))


def codegen() -> nn.Module:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    return CodeGenForCausalLM(CodeGenConfig(n_layer=1, n_head=4, n_embd=32, n_positions=16, rotary_dim=4, **TOKENS))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    options = {k: v for k, v in LAYERS.items() if k != "head_dim"}
    return Phi3ForCausalLM(Phi3Config(**options, **TOKENS))


def modern_bert() -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return ModernBertForMaskedLM(ModernBertConfig(**sizes, cls_token_id=1, sep_token_id=2, **TOKENS))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(_bert(BertConfig))


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(_bert(BertConfig, num_labels=5))


def _bert(config, **options):
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return config(**sizes, max_position_embeddings=16, **TOKENS, **options)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **TOKENS))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 11}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, decoder_start_token_id=1, **TOKENS))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=32, state_size=8, time_step_rank=4, **TOKENS))


def mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **TOKENS))


def wav2vec2_conformer() -> nn.Module:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    front = {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
    return Wav2Vec2ConformerForCTC(
        Wav2Vec2ConformerConfig(**sizes, **front, num_feat_extract_layers=2, num_conv_pos_embedding_groups=4, **TOKENS)
    )


def lora(model: Callable[[], nn.Module], **options) -> nn.Module:
    """A model with adapters of rank 4, as `peft.get_peft_model` returns it."""
    import peft

    return peft.get_peft_model(model(), peft.LoraConfig(r=4, **options))


class BasicBlock(nn.Module):
    """torchvision's, with its names."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 else None
        )


class ResNet(nn.Module):
    """torchvision's, with its names and two stages."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
        self.fc = nn.Linear(16, classes)


class TimmAttention(nn.Module):
    """timm's, with its names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = TimmAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


class TimmPatches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)


class TimmViT(nn.Module):
    """timm's VisionTransformer, with its names."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.num_classes = classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, 4, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.patch_embed = TimmPatches(width)
        self.blocks = nn.Sequential(TimmBlock(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def get_classifier(self) -> nn.Module:
        return self.head


class VGG(nn.Module):
    """torchvision's, whose classifier has hidden layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.classifier = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


class Convolutions(nn.Module):
    """Grouped, depthwise, transposed and pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 7, groups=32)
        self.pointwise = nn.Conv2d(32, 16, 1)
        self.sound = nn.Conv1d(16, 24, 5)
        self.volume = nn.Conv3d(8, 12, 3)
        self.transposed = nn.ConvTranspose2d(16, 8, 4)
        self.transposed_groups = nn.ConvTranspose2d(16, 8, 4, groups=2)
        self.transposed_depthwise = nn.ConvTranspose1d(8, 8, 4, groups=8)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, num_layers=2)
        self.lstm = nn.LSTM(8, 16, bidirectional=True, proj_size=6)
        self.rnn = nn.RNN(8, 16)
        self.cell = nn.GRUCell(8, 16)


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, add_bias_kv=True)


def attention_with_other_widths() -> nn.Module:
    return nn.MultiheadAttention(8, 2, kdim=6, vdim=4)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16)


class GroupedExperts(nn.Module):
    """torchtitan's, with its names: w1 and w3 are (experts, hidden, dim), w2 (experts, dim, hidden)."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.w1 = nn.Parameter(torch.zeros(experts, hidden, width))
        self.w2 = nn.Parameter(torch.zeros(experts, width, hidden))
        self.w3 = nn.Parameter(torch.zeros(experts, hidden, width))


class TitanRouter(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate = nn.Linear(width, experts, bias=False)


class TitanMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = GroupedExperts(32, 48, 8)
        self.router = TitanRouter(32, 8)


class NanoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd = 4, 32
        self.c_attn = nn.Linear(32, 96)
        self.c_proj = nn.Linear(32, 32)


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = NanoAttention()
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(32, 128), "c_proj": nn.Linear(128, 32)})


class NanoGPT(nn.Module):
    """nanoGPT's, with its names."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(96, 32),
                "wpe": nn.Embedding(16, 32),
                "h": nn.ModuleList([NanoBlock()]),
                "ln_f": nn.LayerNorm(32),
            }
        )
        self.lm_head = nn.Linear(32, 96, bias=False)
        if tie:
            self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.transformer["wte"](ids))


def lora_gpt2() -> nn.Module:
    return lora(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def lora_qwen2() -> nn.Module:
    """With DoRA's magnitudes and an adapted embedding."""
    return lora(qwen2, target_modules=["q_proj", "embed_tokens"], use_dora=True)


def lora_phi3() -> nn.Module:
    """On fused projections and the head."""
    return lora(phi3, target_modules=["qkv_proj", "gate_up_proj", "lm_head"])


def lora_mixtral() -> nn.Module:
    """On an expert bank."""
    return lora(mixtral, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])


def lora_bert_classifier() -> nn.Module:
    """With a classifier that is trained in full."""
    return lora(bert_classifier, task_type="SEQ_CLS")


TORCH: dict[str, Callable[[], nn.Module]] = {
    "multihead_attention": attention,
    "multihead_attention_widths": attention_with_other_widths,
    "transformer_encoder_layer": encoder_layer,
    "recurrent": Recurrent,
    "convolutions": Convolutions,
    "resnet": ResNet,
    "vgg": VGG,
    "timm_vit": TimmViT,
    "nano_gpt": NanoGPT,
    "titan_moe": TitanMoE,
}

TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder
    for builder in (
        *(gpt2, gpt2_classifier, llama, tied_llama, llama_trunk, qwen2, qwen3, qwen3_next, mixtral, qwen2_moe, gpt_oss),
        *(
            llama4,
            dbrx,
            granite_moe,
            deepseek_v3,
            gpt_neox,
            bloom,
            falcon_7b,
            falcon_40b,
            gpt_bigcode,
            codegen,
            phi3,
            modern_bert,
        ),
        *(bert, bert_classifier, t5, vit, convnext, whisper, mamba, mamba2, wav2vec2_conformer),
    )
}

PEFT: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder for builder in (lora_gpt2, lora_qwen2, lora_phi3, lora_mixtral, lora_bert_classifier)
}

GOLDEN = Path(__file__).parent / "golden"


def table(build: Callable[[], nn.Module]) -> str:
    """The plan of a model on the meta device, which tells what is routed and tied as well as a real one does."""
    import schatten

    with torch.device("meta"):
        model = build()
    return f"{schatten.plan(model)}\n"


if __name__ == "__main__":
    for name, build in {**TORCH, **TRANSFORMERS, **PEFT}.items():
        (GOLDEN / f"{name}.txt").write_text(table(build))
