"""Fanions: the leading singular directions only, alone or mixed with the Frobenius direction."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Frobenius, KyFan
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum


class Fanion(SpectralOptimizer):
    r"""Fanion-k and F-Fanion-k (arXiv 2512.09678): D = sum over i <= k of u_i v_i^T of the Nesterov momentum S.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,
        W <- (1 - lr lambda) W - lr c (alpha D_k + (1 - alpha) S / ||S||_F)

    k = 1 is Neon, k >= min(m, n) Muon; `alpha` below 1 mixes in the Frobenius direction (F-Fanion, alpha = 1/2). K is the
    Ky Fan-k norm, so with decay lambda it solves min F subject to ||W||_op <= c / lambda and ||W||_* <= k c / lambda; a
    mixture constrains W to alpha times that set plus the ball of Frobenius norm (1 - alpha) c / lambda.

    Differences from the released code: the leading directions come from a block Krylov space (`schatten.solvers.krylov`)
    instead of a thick-restart Lanczos iteration. The paper finds low ranks clearly worse than Muon on networks.

    Args:
        params: a module, or matrices.
        count: k.
        lr: default Keller's, the spectral norm of one update but for the shape factor.
        weight_decay: decoupled decay lambda, 0 in the paper.
        momentum: beta.
        alpha: the weight of D_k in (0, 1].
        nesterov, scale, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.Fanion([W], count=1, lr=0.5)
        >>> W.grad = torch.diag(torch.tensor([1.0, 3.0]))
        >>> opt.step()
        >>> W.diagonal().round(decimals=2).abs().tolist()
        [0.0, 0.5]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        count: int = 5,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        alpha: float = 1.0,
        nesterov: bool = True,
        scale: str = "keller",
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {alpha!r}; for 0 use LionK(params, maps.Frobenius()).")
        map = KyFan(count) if alpha == 1 else alpha * KyFan(count) + (1 - alpha) * Frobenius()
        rule = Rule(Momentum(nesterov=nesterov), map, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
