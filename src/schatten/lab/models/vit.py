"""A vision transformer (Dosovitskiy et al. 2020) of GPT's blocks without the causal mask."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from schatten.lab.models.gpt import Block, GPTConfig


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT; the default is ViT-tiny's width and depth (Touvron et al. 2020) on CIFAR's images.

    `patch` must divide `height` and `pixel_width`, `heads` must divide `width`; the head reads a class token of its own or,
    with pooling `"mean"`, the mean of all patches.
    """

    channels: int = 3
    height: int = 32
    pixel_width: int = 32
    classes: int = 10
    patch: int = 4
    layers: int = 12
    heads: int = 3
    width: int = 192
    pooling: Literal["token", "mean"] = "token"


class ViT(nn.Module):
    """Images (batch, channels, height, width) -> scores (batch, classes): patches, positions, pre-norm blocks, head.

    Raises ValueError for a patch that does not divide the image.

    Example:
        >>> import torch
        >>> from schatten.lab.models import ViT, ViTConfig
        >>> ViT(ViTConfig(channels=1, height=8, pixel_width=8, layers=1, heads=2, width=16))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if config.height % config.patch or config.pixel_width % config.patch:
            raise ValueError(f"patch must divide the image, got {config.patch} and {config.height} x {config.pixel_width}.")
        self.config = config
        token = config.pooling == "token"
        count = (config.height // config.patch) * (config.pixel_width // config.patch) + token
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch, bias=False)
        self.positions = nn.Embedding(count, config.width)
        self.class_token = nn.Parameter(torch.zeros(config.width)) if token else None
        block = GPTConfig(vocabulary=0, context=count, heads=config.heads, width=config.width)
        self.blocks = nn.ModuleList(Block(block, causal=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.classes)
        for name, p in self.named_parameters():
            if p.ndim >= 2 and not name.startswith("patches"):
                residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        x = x + self.positions.weight
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.class_token is None else x[:, 0])
