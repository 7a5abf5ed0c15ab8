"""KL-SOAP: Adam in the eigenbasis of the gradient's Kronecker covariance; SOAP by the choice of statistics."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from schatten.directions import rescaled
from schatten.maps import Power
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import State
from schatten.signals.core import check_size
from schatten.signals.eigenbasis import Eigenbasis, quotient


@dataclass(frozen=True)
class RotatedAdam:
    """S = Q_L [M' / (sqrt(V') + eps)] Q_R^T, bias-corrected moments of Q_L^T G Q_R from t = 2; sqrt(min(m, n)) G / ||G|| at 1.

    (beta1, beta2) is group["betas"]. Raises ValueError for a negative or infinite eps.
    """

    basis: Eigenbasis = field(default_factory=lambda: Eigenbasis("kl"))
    eps: float = 1e-6

    hyperparameters: ClassVar[tuple[str, ...]] = ("betas",)
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_size("eps", self.eps)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(W), "exp_avg_sq": torch.zeros_like(W), **self.basis.init(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        (beta1, beta2), first = group["betas"], state["step"] == 1
        turn, bases = self.basis(G, state, group, memory=max(beta1, beta2**0.5))
        P = turn.into(G)
        M = torch.where(first, 0.0, torch.lerp(state["exp_avg"], G, 1 - beta1))
        V = torch.where(first, 0.0, turn.carried(state["exp_avg_sq"]) * beta2 + P.square() * (1 - beta2))
        count = (state["step"] - 1).clamp(min=1)
        S = turn.back(quotient(turn.into(M) / (1 - beta1**count), V / (1 - beta2**count), self.eps))
        # In the bases of its own gradient alone P is diagonal: S would be U V^T, of this norm, and signs of rounding errors.
        start = rescaled(P, torch.linalg.vector_norm(P, dim=(-2, -1), keepdim=True), min(G.shape[-2:]) ** 0.5)
        return torch.where(first, turn.back(start), S), {"exp_avg": M, "exp_avg_sq": V, **bases}


class KLSOAP(SpectralOptimizer):
    r"""KL-SOAP (Lin et al., arXiv 2509.03378): Adam in the eigenbases of L and R, each whitened by the other.

        L <- beta_s L + (1 - beta_s) G R^-1 G^T,   R <- beta_s R + (1 - beta_s) G^T L^-1 G,   Q_L, Q_R their eigenbases
        P = Q_L^T G Q_R,   M <- beta_1 M + (1 - beta_1) G,   V <- beta_2 V + (1 - beta_2) P^2
        D = Q_L [Q_L^T M' Q_R / (sqrt(V') + eps)] Q_R^T,   W <- (1 - lr lambda) W - lr D,   ' bias-corrected

    L and R are covariances of rows and columns that are estimated together, by least Kullback-Leibler divergence; how R^-1 is
    taken is in `schatten.signals.eigenbasis`. `statistics="gram"` is SOAP (arXiv 2409.11321). KL-SOAP-H and SOAP-H of the
    modded-nanogpt benchmark are `decay=schatten.retractions.FixedNorm(), lr=0.018`.

    Differences from the released code: the current gradient is in L, R and the bases before it is projected, which at large
    batch avoids spikes (arXiv 2607.20548); one QR step at every step, as in the benchmark, with columns sorted as in SOAP;
    the eigenvalues of R^-1 are read off R instead of averaged; no start value or clamp in the gradient's unit, and eps is
    relative, so the gradient's scale does not matter; moments are bias-corrected, which the benchmark drops. The first gradient
    of a matrix makes its bases and enters no moment, as there; the weight takes a step along it of the length of U V^T.

    Decay implies a squared Frobenius norm, min F + lambda/2 ||W||_F^2, only in so far as it would for Adam: were D the
    gradient.

    Args:
        params: a module, or matrices.
        lr: in AdamW's units, default SOAP's.
        weight_decay: decoupled decay lambda, default SOAP's.
        betas: of M and V, default the benchmark's; the paper's code has (0.9, 0.98).
        statistics: `"kl"` or `"gram"`.
        shampoo_beta: of L and R.
        max_dim: longer sides are not turned.
        eps: added to sqrt(V'), as a share of its Frobenius norm; below it entries are rounding errors.
        decay: `"explicit"`, `"implicit"` or `"cautious"` decoupled decay, or a retraction of `schatten.retractions`.
        options: of `SpectralOptimizer`.

    State: M, V, L, R, Q_L, Q_R, which is 2 + 2 (m^2 + n^2) / (m n) times an m x n matrix, 6 times a square one.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.eye(3))
        >>> opt = schatten.KLSOAP([W], lr=0.018, decay=schatten.retractions.FixedNorm())
        >>> for _ in range(3):
        ...     W.grad = torch.randn(3, 3)
        ...     opt.step()
        >>> round(W.square().sum().item(), 4)
        3.0
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.9),
        *,
        statistics: Literal["kl", "gram"] = "kl",
        shampoo_beta: float = 0.9,
        max_dim: int = 8192,
        eps: float = 1e-6,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        signal = RotatedAdam(Eigenbasis(statistics, shampoo_beta, max_dim), eps)
        rule = Rule(signal, Power(1.0, over="entries"), Scale("none"), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, betas=betas, **options)
