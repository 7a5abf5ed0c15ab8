"""Lion's blend of a gradient with an average of gradients, by two betas."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.signals.core import State


@dataclass(frozen=True)
class TwoBeta:
    """Lion-K's signal with `(beta1, beta2) = group["betas"]` (Chen, Liu, Liang and Liu, 2024; arXiv 2506.15054, eq. 2).

        form="paper":  S = beta1 M + (1 - beta1) G,   M <- beta2 M + (1 - beta2) G     S reads the old M
        form="site":   M <- beta2 M + (1 - beta2) G,  S = beta1 M + (1 - beta1) G      S reads the new M

    The site's form with (b_n, b_p) is the paper's with beta1 = b_n b_p and beta2 = b_p. The papers average the negative
    gradient and add the direction; every K is even, so averaging G and subtracting is the same and what the library does.
    The paper's form with beta1 = mu^2, beta2 = mu is `Momentum` with Nesterov, with beta1 = beta2 it is `Momentum`
    without, with both 0 the gradient. State: one tensor of the matrix's shape.

    Raises ValueError for another form.

    Example:
        >>> import torch, schatten
        >>> lion = schatten.signals.TwoBeta()
        >>> G = torch.ones(1, 1, 2, 2)
        >>> S, state = lion(G, lion.init(G), {"betas": (0.5, 0.75)})
        >>> float(S[0, 0, 0, 0]), float(state["momentum_buffer"][0, 0, 0, 0])
        (0.5, 0.25)
    """

    form: str = "paper"

    hyperparameters: ClassVar[tuple[str, ...]] = ("betas",)
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.form not in ("paper", "site"):
            raise ValueError(f"form must be 'paper' (S reads the old average) or 'site' (the new one), got {self.form!r}.")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        old = state["momentum_buffer"]
        M = torch.lerp(old, G, 1 - beta2)
        return torch.lerp(G, old if self.form == "paper" else M, beta1), {"momentum_buffer": M}
