"""S-Muon: half Muon, half a small sign step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from schatten.maps import L1, Nuclear, Scaled, Sum
from schatten.maps.core import Combinable
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class NuclearPlusSign(Combinable):
    """K(S) = alpha ||S||_* + (1 - alpha) (eta_s / c) ||S||_1, c the shape factor of `scale`, which its rule multiplies with.

    So the update is c alpha U V^T + (1 - alpha) eta_s sign(S): the sign part does not carry the factor.
    """

    alpha: float
    eta_s: float
    scale: Scale
    nuclear: Nuclear = field(default_factory=Nuclear)

    def _sum(self, shape: tuple[int, ...]) -> Sum:
        return self._of(self.scale.factor(shape[-2], shape[-1]))

    def _of(self, factor: float) -> Sum:
        return Sum((Scaled(self.nuclear, self.alpha), Scaled(L1(), (1 - self.alpha) * self.eta_s / factor)))

    def value(self, S: Tensor) -> Tensor:
        return self._sum(S.shape).value(S)

    def grad(self, S: Tensor) -> Tensor:
        return self._sum(S.shape).grad(S)

    def conjugate(self, X: Tensor) -> Tensor:
        return self._sum(X.shape).conjugate(X)

    def violation(self, X: Tensor) -> Tensor:
        return self._sum(X.shape).violation(X)

    def describe(self, weight_decay: float, factor: float = 1.0) -> str:
        return self._of(factor).describe(weight_decay, factor)


class SMuon(SpectralOptimizer):
    r"""S-Muon (arXiv 2512.09678): W <- (1 - lr lambda) W - lr (alpha c U V^T + (1 - alpha) eta_s sign(S)) of the momentum S.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M = U Sigma V^T

    K = alpha ||S||_* + (1 - alpha) (eta_s / c) ||S||_1, so with decay lambda it solves min F over W = X + Y with
    ||X||_op <= alpha c / lambda and |y| <= (1 - alpha) eta_s / lambda for every entry. The sign part does not carry the shape
    factor: with it the paper's speedrun loses 0.005.

    Args:
        params: a module, or matrices.
        lr: default Keller's.
        weight_decay: decoupled decay lambda, 0 in the paper.
        momentum: beta.
        alpha: the weight of the polar factor in (0, 1), 1/2 in the paper.
        eta_s: the length of a sign step, an entry's change; 0.01 on the paper's convex problem, 3e-3 on CIFAR-10, 3e-4 on
            NanoGPT, to be tuned with lr.
        nesterov, scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    No difference from the released code but the solver (a minimax polynomial). State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.SMuon([W], lr=1.0, eta_s=0.1, solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.55, -0.55]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        alpha: float = 0.5,
        eta_s: float = 3e-3,
        nesterov: bool = True,
        scale: str = "keller",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {alpha!r}; for 1 use Muon, for 0 LionK(params, maps.L1()).")
        if isinstance(eta_s, bool) or not isinstance(eta_s, (int, float)) or not 0 < eta_s < float("inf"):
            raise ValueError(f"eta_s must lie in (0, inf), got {eta_s!r}; without a sign part use Muon.")
        map = NuclearPlusSign(alpha, eta_s, Scale(scale), Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Momentum(nesterov=nesterov), map, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
