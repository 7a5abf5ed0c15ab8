"""SOAP-Muon: momentum divided by its root mean square in the gradient's eigenbasis, then orthogonalised."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schatten.directions import rescaled
from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import State
from schatten.signals.core import check_size, check_switch
from schatten.signals.eigenbasis import Eigenbasis, quotient
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class EqualisedMomentum:
    """S' = Q_L (P / sqrt(v)) Q_R^T ||S||_F / ||.||_F of momentum S, P = Q_L^T S Q_R, v an average of P^2; S' = S at t = 1.

    beta is group["momentum"], that of v group["beta2"]. Raises ValueError for a negative or infinite eps.
    """

    basis: Eigenbasis = field(default_factory=Eigenbasis)
    nesterov: bool = True
    eps: float = 1e-6

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum", "beta2")
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_size("eps", self.eps)
        check_switch("nesterov", self.nesterov)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(W), "exp_avg_sq": torch.zeros_like(W), **self.basis.init(W)}

    def __call__(self, G: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        beta, beta2, first = group["momentum"], group["beta2"], state["step"] == 1
        M = torch.lerp(state["momentum_buffer"], G, 1 - beta)
        S = torch.lerp(G, M, beta) if self.nesterov else M
        turn, bases = self.basis(G, state, group, memory=max(beta, beta2**0.5))
        P = turn.into(S)
        V = torch.where(first, 0.0, turn.carried(state["exp_avg_sq"]) * beta2 + P.square() * (1 - beta2))
        D = quotient(P, V, self.eps)
        D = turn.back(rescaled(D, _norm(D), _norm(P))) * turn.unit
        # In the bases of its own gradient alone P is diagonal: S' would be U V^T and signs of rounding errors.
        return torch.where(first, S, D), {"momentum_buffer": M, "exp_avg_sq": V, **bases}


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)


class SOAPMuon(SpectralOptimizer):
    r"""SOAP-Muon (N. Vyas; modded-nanogpt pull requests 278 and 321, 2026): Muon of a momentum that SOAP has equalised.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M
        L <- beta_s L + (1 - beta_s) G G^T,   R <- beta_s R + (1 - beta_s) G^T G,   Q_L, Q_R their eigenbases
        P = Q_L^T S Q_R,   v <- beta_2 v + (1 - beta_2) P^2,   S' = Q_L (P / sqrt(v)) Q_R^T,   D = msign(S')

    P is the projected momentum, not the projected gradient that SOAP squares. The bases (`schatten.signals.eigenbasis`) take
    one QR step at every step; v is permuted with their columns. A matrix's first step only makes its bases: it is Muon's.

    Differences from the released code: L, R and the bases are updated before the step, so that the current gradient is in
    them, where the release updates them after it; at large batch a basis that has not seen its gradient makes the loss
    spike (arXiv 2607.20548). The averages start at their first value instead of 0. eps is relative, so the gradient's scale
    does not matter. The release's gate on attention outputs, its floor on ||U|| / ||W|| and its pinned radius are left out;
    the gate's benefit is unproven, the floor is `schatten.retractions.UpdateFloor`.

    D has spectral norm 1, so decay keeps ||W||_op <= c / lambda; where in that ball weights settle is the solution of no
    fixed problem, as S' is not the gradient.

    Args:
        params: a module, or matrices.
        lr: default that of the benchmark's tuned Muon, whose updates are as long as these. The record's 0.0375 belongs to
            its floor and pinned radius.
        weight_decay: decoupled decay lambda, default likewise; the record decays cautiously (`decay="cautious"`) by 0.025.
        momentum: beta.
        beta2: of v.
        shampoo_beta: of L and R.
        nesterov: use the look-ahead S instead of M.
        max_dim: longer sides are not turned.
        eps: added to sqrt(v), as a share of its Frobenius norm; below it entries are rounding errors.
        scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: M, v, L, R, Q_L, Q_R, which is 2 + 2 (m^2 + n^2) / (m n) times an m x n matrix, 6 times a square one.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(4, 3))
        >>> opt = schatten.SOAPMuon([W], lr=0.1, weight_decay=0.0)
        >>> for _ in range(2):
        ...     W.grad = torch.randn(4, 3)
        ...     opt.step()
        >>> bool(torch.linalg.matrix_norm(W, ord=2) < 0.3)
        True
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.025,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        beta2: float = 0.9,
        *,
        shampoo_beta: float = 0.9,
        nesterov: bool = True,
        max_dim: int = 8192,
        eps: float = 1e-6,
        scale: str = "keller",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        signal = EqualisedMomentum(Eigenbasis("gram", shampoo_beta, max_dim), nesterov, eps)
        rule = Rule(signal, Nuclear(polynomial() if solver is None else solver), Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, **options)
