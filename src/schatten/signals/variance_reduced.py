"""Variance-reduced momentum: gradient differences at one sample correct the average."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.maps.lifts import safe_norm
from schatten.signals.core import State, check_switch


@dataclass(frozen=True)
class VarianceReduced:
    """MVR's and MARS's signal (arXiv 2509.15816, 2510.21800), beta = group["momentum"].

        C = G + gamma beta / (1 - beta) (G - G'),   C <- C / max(1, ||C||_F)  (clip),   M <- beta M + (1 - beta) C,   S = M

    G' is the gradient at the last weights: of the last sample, kept from the last step (MVR1), or with `exact` of this
    sample, which whoever evaluates it writes into state["previous_gradient"] (MVR2). gamma = 1 without the clip is STORM,
    M <- G + beta (M - G'), gamma = 0 plain momentum. At a parameter's first step G' = G.

    The clip is of each matrix and ties the rule to the gradient's absolute scale. State: two tensors of the matrix's shape.

    Raises ValueError for gamma outside [0, 1].

    Example:
        >>> import torch, schatten
        >>> storm = schatten.signals.VarianceReduced(gamma=1.0, clip=False)
        >>> G = torch.full((1, 1, 2, 2), 3.0)
        >>> state = {"momentum_buffer": G, "previous_gradient": G - 1, "step": torch.full((1, 1, 1, 1), 2.0)}
        >>> round(float(storm(G, state, {"momentum": 0.9})[0][0, 0, 0, 0]), 4)  # 3 + 0.9 (3 - 2)
        3.9
    """

    gamma: float = 0.025
    clip: bool = True
    exact: bool = False

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1] (0 is plain momentum, 1 STORM), got {self.gamma!r}.")
        object.__setattr__(self, "gamma", float(self.gamma))
        check_switch("clip", self.clip)
        check_switch("exact", self.exact)

    @property
    def fed_by(self) -> str | None:
        return "MuonMVR" if self.exact else None

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(W), "previous_gradient": torch.zeros_like(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        beta = group["momentum"]
        previous = torch.where(state["step"] > 1, state["previous_gradient"], G)
        C = G + (G - previous) * (self.gamma * beta / (1 - beta))
        if self.clip:
            C = C / safe_norm(C, (-2, -1)).clamp(min=1.0)
        M = torch.lerp(state["momentum_buffer"], C, 1 - beta)
        return M, {"momentum_buffer": M} if self.exact else {"momentum_buffer": M, "previous_gradient": G}
