"""F-Muon: half Muon, half normalised SGD."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Frobenius, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


class FMuon(SpectralOptimizer):
    r"""F-Muon (arXiv 2512.09678): W <- (1 - lr lambda) W - lr c (alpha U V^T + (1 - alpha) S / ||S||_F) of the momentum S.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M = U Sigma V^T

    K = alpha ||S||_* + (1 - alpha) ||S||_F, so with decay lambda it solves min F over W = X + Y with
    ||X||_op <= alpha c / lambda and ||Y||_F <= (1 - alpha) c / lambda. Both parts carry the shape factor: without it on the
    Frobenius part the paper's speedrun loses 0.007. It wins on their convex problem (`schatten lab run fanions`), not on
    networks, where the paper has it as good as Muon over a wider range of lr; a tiny GPT of ours has it behind.

    Args:
        params: a module, or matrices.
        lr: default Keller's.
        weight_decay: decoupled decay lambda, 0 in the paper.
        momentum: beta.
        alpha: the weight of the polar factor in (0, 1), 1/2 in the paper.
        nesterov, scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    No difference from the released code but the solver (a minimax polynomial). State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.FMuon([W], lr=1.0, solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.8, -0.9]
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
        nesterov: bool = True,
        scale: str = "keller",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ValueError(f"alpha must lie in (0, 1), got {alpha!r}; for 1 use Muon, for 0 LionK(params, maps.Frobenius()).")
        map = alpha * Nuclear(polynomial() if solver is None else solver) + (1 - alpha) * Frobenius()
        rule = Rule(Momentum(nesterov=nesterov), map, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
