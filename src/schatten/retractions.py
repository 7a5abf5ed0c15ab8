"""Retractions: how an update reaches the weight, (W, U, lr, weight_decay) -> new W."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Retraction(Protocol):
    """A pure function of the weight, the update, the learning rate and the weight decay."""

    def __call__(self, W: Tensor, U: Tensor, lr: float | Tensor, weight_decay: float) -> Tensor: ...


@dataclass(frozen=True)
class DecoupledDecay:
    """Weight decay beside the gradient, by the learning rate that is not multiplied by the shape factor.

        form="explicit":  W <- (1 - lr lambda) W - lr U      (AdamW, Keller's Muon, torch, Dion)
        form="implicit":  W <- (W - lr U) / (1 + lr lambda)  (arXiv 2506.15054, eq. 3)

    Either way W stays within, or tends to, the set where K*(lambda W / c) is finite; explicit decay does so at rate
    1 - lr lambda and needs lr lambda <= 1, implicit decay at rate 1 / (1 + lr lambda) for any lr.
    """

    form: Literal["explicit", "implicit"] = "explicit"

    def __post_init__(self) -> None:
        if self.form not in ("explicit", "implicit"):
            raise ValueError(f"decay must be 'explicit' or 'implicit', got {self.form!r}.")

    def __call__(self, W: Tensor, U: Tensor, lr: float | Tensor, weight_decay: float) -> Tensor:
        if self.form == "explicit":
            return W * (1 - lr * weight_decay) - lr * U
        return (W - lr * U) / (1 + lr * weight_decay)
