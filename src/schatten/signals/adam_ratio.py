"""Adam's ratio of moments as a signal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.signals.core import State, check_size


@dataclass(frozen=True)
class AdamRatio:
    """Adam's update before the learning rate, with `(beta1, beta2) = group["betas"]`.

        M <- beta1 M + (1 - beta1) G,   V <- beta2 V + (1 - beta2) G^2,
        S = [M / (1 - beta1^t)] / (sqrt(V / (1 - beta2^t)) + eps)

    t counts the steps of each parameter. State: two tensors of the matrix's shape.

    Raises ValueError for a negative or infinite eps.

    Example:
        >>> import torch, schatten
        >>> ratio = schatten.signals.AdamRatio()
        >>> G = torch.tensor([[[[3.0, -4.0]]]])
        >>> state = {**ratio.init(G), "step": torch.ones(1, 1, 1, 1)}
        >>> ratio(G, state, {"betas": (0.9, 0.95)})[0].flatten().round().tolist()
        [1.0, -1.0]
    """

    eps: float = 1e-8

    hyperparameters: ClassVar[tuple[str, ...]] = ("betas",)
    elementwise: ClassVar[bool] = True
    squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size("eps", self.eps)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(W), "exp_avg_sq": torch.zeros_like(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        step = state["step"]
        M = torch.lerp(state["exp_avg"], G, 1 - beta1)
        V = (state["exp_avg_sq"] * beta2).addcmul_(G, G, value=1 - beta2)
        S = M / (1 - beta1**step) / ((V / (1 - beta2**step)).sqrt_().add_(self.eps))
        return S, {"exp_avg": M, "exp_avg_sq": V}
