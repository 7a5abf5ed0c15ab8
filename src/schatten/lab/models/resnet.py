"""A residual network for images: ResNet's basic blocks (He et al. 2015) behind the stem of their CIFAR networks."""

import itertools
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet; the default is ResNet-18. Every stage but the first halves height and width."""

    channels: int = 3
    classes: int = 10
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)


class BasicBlock(nn.Module):
    """relu(x + B(relu(A(x)))), A and B a 3 x 3 convolution and a batch norm; another shape of x is projected."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(fan_out)
        self.second = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != fan_out:
            self.shortcut.append(nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False)).append(nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images of any size, (batch, channels, height, width) -> scores (batch, classes): stem, stages, global mean, head.

    Raises ValueError for widths and blocks of different lengths.

    Example:
        >>> import torch
        >>> from schatten.lab.models import ResNet, ResNetConfig
        >>> ResNet(ResNetConfig(channels=1, widths=(8, 16), blocks=(1, 1)))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        if not config.widths or len(config.widths) != len(config.blocks):
            raise ValueError(f"ResNetConfig needs one number of blocks per width, got {config.widths} and {config.blocks}.")
        self.config = config
        self.stem = nn.Conv2d(config.channels, config.widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(config.widths[0])
        stages = [
            nn.Sequential(*(BasicBlock(before if i == 0 else width, width, 2 if i == 0 and stage else 1) for i in range(count)))
            for stage, ((before, width), count) in enumerate(
                zip(itertools.pairwise((config.widths[0], *config.widths)), config.blocks, strict=True)
            )
        ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(config.widths[-1], config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem_norm(self.stem(images))))
        return self.head(x.mean((-2, -1)))
