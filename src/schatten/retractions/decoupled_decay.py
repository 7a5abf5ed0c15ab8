"""Decoupled weight decay: AdamW's and Muon's way to the weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from schatten.retractions.core import State, Stateless, decay_of, minus_


@dataclass(frozen=True)
class DecoupledDecay(Stateless):
    """Weight decay beside the gradient, by the learning rate that is not multiplied by the shape factor.

        form="explicit":  W <- (1 - lr lambda) W - lr c D      (AdamW, Keller's Muon, torch, Dion)
        form="implicit":  W <- (W - lr c D) / (1 + lr lambda)  (arXiv 2506.15054, eq. 3)

    Either way W stays within, or tends to, the set where K*(lambda W / c) is finite; explicit decay does so at rate
    1 - lr lambda and needs lr lambda <= 1, implicit decay at rate 1 / (1 + lr lambda) for any lr.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.DecoupledDecay("implicit")
        >>> group = {"lr": 1.0, "weight_decay": 1.0}
        >>> retract(torch.tensor([[3.0]]), torch.tensor([[1.0]]), length=1.0, state={}, group=group)[0]
        tensor([[1.]])
    """

    form: Literal["explicit", "implicit"] = "explicit"

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.form not in ("explicit", "implicit"):
            raise ValueError(f"decay must be 'explicit' or 'implicit', got {self.form!r}.")

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        decay = decay_of(group)
        if self.form == "explicit":
            return minus_(W * (1 - decay), D, length), {}
        return minus_(W.clone(), D, length).div_(1 + decay), {}
