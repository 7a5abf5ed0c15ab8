"""Models of the laboratory, small enough for a laptop and of any size."""

from schatten.lab.models.gpt import GPT, Attention, Block, GPTConfig
from schatten.lab.models.hugging_face import classifier, decoder
from schatten.lab.models.latent_attention import LatentAttention, LatentAttentionConfig
from schatten.lab.models.latent_moe import LatentMoE, LatentMoEConfig
from schatten.lab.models.mixture import Mixture, MixtureConfig
from schatten.lab.models.mlp import MLP
from schatten.lab.models.resnet import ResNet, ResNetConfig
from schatten.lab.models.vit import ViT, ViTConfig

__all__ = [
    "GPT",
    "MLP",
    "Attention",
    "Block",
    "GPTConfig",
    "LatentAttention",
    "LatentAttentionConfig",
    "LatentMoE",
    "LatentMoEConfig",
    "Mixture",
    "MixtureConfig",
    "ResNet",
    "ResNetConfig",
    "ViT",
    "ViTConfig",
    "classifier",
    "decoder",
]
