"""A multilayer perceptron."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers of `widths` (inputs first, outputs last) with ReLU between, on flattened inputs; torch's initialisation.

    Example:
        >>> from schatten.lab.models import MLP
        >>> [tuple(p.shape) for p in MLP((64, 32, 10)).parameters()]
        [(32, 64), (10, 32)]
    """

    def __init__(self, widths: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))
