"""Models of known sizes, built without data: for plans and simulations of what does not fit on this machine."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from schatten.lab.errors import InputError

Builder = Callable[[], nn.Module]


def llama_8b() -> nn.Module:
    """Llama 3.1 8B: 32 layers of width 4096, 8 key and value heads."""
    return _causal(
        "Llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )


def llama_70b() -> nn.Module:
    """Llama 3.1 70B: 80 layers of width 8192, 8 key and value heads."""
    return _causal(
        "Llama",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )


def qwen_moe_30b() -> nn.Module:
    """Qwen3 30B-A3B: 48 layers of width 2048, each with 128 experts of 768, of which a token sees 8."""
    return _causal(
        "Qwen3Moe",
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )


def gpt2_small() -> nn.Module:
    """GPT-2 small: 12 layers of width 768, fused QKV, tied head."""
    transformers = _transformers()
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def resnet_50() -> nn.Module:
    """ResNet-50: 53 convolutions and a classifier of 1000 classes."""
    transformers = _transformers()
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


MODELS: dict[str, Builder] = {
    "llama-8b": llama_8b,
    "llama-70b": llama_70b,
    "qwen-moe-30b": qwen_moe_30b,
    "gpt2-small": gpt2_small,
    "resnet-50": resnet_50,
}


def build(name: str) -> nn.Module:
    """A model of `MODELS`, or what `package.module:function` returns, with parameters that have shapes and no data.

    Raises InputError for a name that is neither and ImportError, with the line to install it, without transformers.
    """
    with torch.device("meta"):
        model = _builder(name)()
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} must return a torch.nn.Module, got {type(model).__name__}.")
    return model


def _builder(name: str) -> Builder:
    if name in MODELS:
        return MODELS[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise InputError(
            f"--model has no {name!r}: known are {', '.join(MODELS)}; for your own write package.module:function, "
            f"a function without arguments that returns the model."
        )
    sys.path.insert(0, "")  # as `python -m` has it
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"--model {name} cannot be imported: {error}.") from None


def _causal(family: str, **sizes: Any) -> nn.Module:
    transformers = _transformers()
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError("the models of --model are built by transformers: pip install 'schatten[hf]'") from None
