"""Cautious weight decay: decay only where the step already shrinks the entry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.retractions.core import State, Stateless, decay_of, minus_


@dataclass(frozen=True)
class CautiousDecay(Stateless):
    """W <- W - lr lambda W o 1[D o W > 0] - lr c D (Cautious Weight Decay, arXiv 2510.12402): decay never fights the step.

    At a stationary point of F the decay is gone, so F itself is minimised; no constraint is implied.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.CautiousDecay()
        >>> group = {"lr": 0.5, "weight_decay": 1.0}
        >>> retract(torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, -1.0]]), length=0.5, state={}, group=group)[0]
        tensor([[0.5000, 2.5000]])
    """

    elementwise: ClassVar[bool] = True

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        shrinks = torch.where(D * W > 0, W, 0.0)
        return minus_(W - shrinks * decay_of(group), D, length), {}
