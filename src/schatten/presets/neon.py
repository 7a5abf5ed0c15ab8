"""Neon: the leading singular direction."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import KyFan
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum


class Neon(SpectralOptimizer):
    r"""Neon (arXiv 2512.09678): W <- (1 - lr lambda) W - lr c u_1 v_1^T of the Nesterov momentum, a step of rank one.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   D = u_1 v_1^T

    K is the spectral norm, so with decay lambda it solves min F subject to ||W||_* <= c / lambda (and ||W||_op <= c / lambda,
    which that implies). It is `Fanion(count=1)`, with its difference from the released code. The paper reports 69.8 % on
    CIFAR-10 where Muon has 94.0: a member of the family for study, and for low-rank problems.

    Args:
        params: a module, or matrices.
        lr: learning rate; the nuclear norm of one update but for the shape factor.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        nesterov, scale, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.Neon([W], lr=0.5)
        >>> W.grad = torch.diag(torch.tensor([1.0, 3.0]))
        >>> opt.step()
        >>> W.diagonal().round(decimals=2).abs().tolist()
        [0.0, 0.5]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        scale: str = "keller",
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        rule = Rule(Momentum(nesterov=nesterov), KyFan(1), Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
