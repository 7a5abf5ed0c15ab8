"""Decay that fades with the learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.retractions.cautious_decay import CautiousDecay
from schatten.retractions.core import State, Stateless, lr_of
from schatten.retractions.decoupled_decay import DecoupledDecay


@dataclass(frozen=True)
class TiedDecay(Stateless):
    """Decoupled or cautious decay with lambda lr / lr_0 for lambda: a step takes lr^2 lambda / lr_0 of the weight.

    lr_0 is the `initial_lr` that torch's schedulers write into a group; without one lambda is unchanged. Decay then ends with
    the schedule, as in modded-nanogpt and AdamC, and the radius c lr_0 / (lr lambda) of decoupled decay grows as lr falls.

    Raises TypeError for a retraction that has no decay.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.TiedDecay()
        >>> group = {"lr": 0.5, "initial_lr": 1.0, "weight_decay": 0.5}
        >>> retract(torch.tensor([[8.0]]), torch.zeros(1, 1), length=0.5, state={}, group=group)[0]
        tensor([[7.]])
    """

    retraction: DecoupledDecay | CautiousDecay = field(default_factory=DecoupledDecay)

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.retraction, (DecoupledDecay, CautiousDecay)):
            raise TypeError(
                f"TiedDecay needs a retraction that decays, DecoupledDecay() or CautiousDecay(), got {self.retraction!r}."
            )

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "initial_lr" in group:
            group = {**group, "weight_decay": group["weight_decay"] * share(lr_of(group), lr_of({"lr": group["initial_lr"]}))}
        return self.retraction(W, D, length, state, group)


def share(lr: float | Tensor, first: float | Tensor) -> float | Tensor:
    """lr / lr_0, and 0 for lr_0 = 0, a group that a schedule keeps where it is."""
    if isinstance(first, Tensor):
        return torch.where(first > 0, lr / first, 0.0)
    return lr / first if first > 0 else 0.0
