"""Heavy-ball momentum: Muon's signal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from schatten.signals.core import State, check_switch


@dataclass(frozen=True)
class Momentum:
    """Heavy-ball momentum with decay `beta = group["momentum"]`, as an average or as a sum.

        form="ema":  M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M  (nesterov)  or  S = M
        form="sum":  M <- beta M + G,              S = G + beta M             (nesterov)  or  S = M

    At constant beta the two differ by the factor 1 - beta, which a scale-free map (the nuclear norm) does not see and
    every other map does. "ema" is Keller's Muon and torch.optim.Muon's code; "sum" is SGD's momentum and Dion's.
    State: one tensor of the matrix's shape.

    Example:
        >>> import torch, schatten
        >>> momentum = schatten.signals.Momentum(form="sum", nesterov=False)
        >>> G = torch.ones(2, 2)
        >>> S, state = momentum(G, momentum.init(G), {"momentum": 0.9})
        >>> S, state = momentum(G, state, {"momentum": 0.9})
        >>> float(S[0, 0])
        1.899999976158142
    """

    form: Literal["ema", "sum"] = "ema"
    nesterov: bool = True

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.form not in ("ema", "sum"):
            raise ValueError(f"form must be 'ema' (an average) or 'sum', got {self.form!r}.")
        check_switch("nesterov", self.nesterov)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        beta = group["momentum"]
        old = state["momentum_buffer"]
        M = torch.lerp(old, G, 1 - beta) if self.form == "ema" else torch.add(G, old, alpha=beta)
        if not self.nesterov:
            S = M
        elif self.form == "ema":
            S = torch.lerp(G, M, beta)
        else:
            S = torch.add(G, M, alpha=beta)
        return S, {"momentum_buffer": M}
