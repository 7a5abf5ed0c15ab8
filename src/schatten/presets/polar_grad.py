"""PolarGrad: Muon's direction at the length of the signal."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import HalfNuclearSquared
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


class PolarGrad(SpectralOptimizer):
    r"""PolarGrad, momentum first (Lau, Long and Su, arXiv 2505.21799): the polar factor times the nuclear norm.

        M <- beta M + (1 - beta) G,   D = ||M||_* msign(M),   W <- (1 - lr lambda) W - lr D

    With beta = 0 this is steepest descent for the squared spectral norm: where F has smoothness L in that norm,
    lr = 1 / L lowers F by at least ||G||_*^2 / (2 L) (for an exact solver). Unlike Muon's, its steps vanish with the
    gradient, so constant lr converges, and are as long as the gradient is large. D is the gradient of K = ||M||_*^2 / 2, so
    decay lambda solves min F(W) + (lambda / 2) ||W||_op^2.

    Differences from the released code: the solver, a minimax polynomial for which <M, P> is the nuclear norm up to its band of
    0.16 (`solver=schatten.solvers.svd()` or a tighter `polynomial(tol=...)` is exact), instead of QDWH. "Polar first", the
    average of polar factors, is not offered.

    Args:
        params: a module, or matrices.
        lr: default the released one. Its unit is that of W / G: rescaling the loss asks for another, as in SGD.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        nesterov: use (1 - beta) G + beta M instead of M.
        solver: how the polar factor is computed.
        decay: `"explicit"`, `"implicit"` or `"cautious"`, or a retraction.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.PolarGrad([W], lr=0.5, momentum=0.0, solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([1.0, 3.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-2.0, -2.0]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        nesterov: bool = False,
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        K = HalfNuclearSquared(solver=polynomial() if solver is None else solver)
        rule = Rule(Momentum(nesterov=nesterov), K, Scale("none"), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
