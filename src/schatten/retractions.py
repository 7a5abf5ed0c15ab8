"""Retractions: how a direction reaches the weight, (W, D, length, decay) -> new W.

`length` is lr c(shape), so that the update U = c D is never a tensor of its own; `decay` is lr lambda, without the
shape factor.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Retraction(Protocol):
    """A pure function of the weight, the direction, the step's length lr c and its decay lr lambda.

    `elementwise` says that it may be given any rows of a matrix.
    """

    elementwise: ClassVar[bool]

    def __call__(self, W: Tensor, D: Tensor, length: float | Tensor, decay: float | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DecoupledDecay:
    """Weight decay beside the gradient, by the learning rate that is not multiplied by the shape factor.

        form="explicit":  W <- (1 - lr lambda) W - lr c D      (AdamW, Keller's Muon, torch, Dion)
        form="implicit":  W <- (W - lr c D) / (1 + lr lambda)  (arXiv 2506.15054, eq. 3)

    Either way W stays within, or tends to, the set where K*(lambda W / c) is finite; explicit decay does so at rate
    1 - lr lambda and needs lr lambda <= 1, implicit decay at rate 1 / (1 + lr lambda) for any lr.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.DecoupledDecay("implicit")
        >>> retract(torch.tensor([[3.0]]), torch.tensor([[1.0]]), length=1.0, decay=1.0)
        tensor([[1.]])
    """

    form: Literal["explicit", "implicit"] = "explicit"

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.form not in ("explicit", "implicit"):
            raise ValueError(f"decay must be 'explicit' or 'implicit', got {self.form!r}.")

    def __call__(self, W: Tensor, D: Tensor, length: float | Tensor, decay: float | Tensor) -> Tensor:
        if self.form == "explicit":
            return _minus_(W * (1 - decay), D, length)
        return _minus_(W.clone(), D, length).div_(1 + decay)


def _minus_(X: Tensor, D: Tensor, length: float | Tensor) -> Tensor:
    if isinstance(length, Tensor):
        return X.addcmul_(D, length.to(X), value=-1)
    return X.add_(D, alpha=-length)
