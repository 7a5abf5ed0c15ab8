"""The non-Euclidean trust region with a composite term."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Map, Nuclear, Power
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import CompositeStep
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum


class TrustRegion(SpectralOptimizer):
    r"""Kovalev's trust region (arXiv 2503.12645): W <- argmin over ||X - W|| <= lr c of <M, X> + (lambda/2)||X||_F^2 + R(X).

        M <- beta M + (1 - beta) G

    `norm=Nuclear()` makes the ball spectral, and with lambda = 0 and no R the step is Muon's without Nesterov; `Frobenius()` is
    normalised SGD, `L1()` sign descent, both with momentum. lambda and R are part of the objective, F + lambda/2 ||W||_F^2 + R,
    and no decoupled decay: weights are not held in a ball. R is `penalty`, a multiple of a norm: `0.01 * maps.Nuclear()`
    favours low rank, `0.01 * maps.L1()` zeros.

    The paper has no experiments; its extrapolated gradient for second-order smoothness is not included.

    Args:
        params: a module, or matrices.
        lr: the radius of the ball, but for the shape factor.
        weight_decay: lambda.
        momentum: beta.
        norm: whose dual norm measures the step.
        penalty: R.
        iterations: of the splitting that a penalty needs, see `schatten.retractions.CompositeStep`.
        scale: shape factor of the radius, see `Muon`.
        options: of `SpectralOptimizer`.

    State: one tensor per matrix. A step with lambda costs a singular value decomposition, one with R two per iteration: this
    is for study and for small matrices.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.eye(2))
        >>> opt = schatten.TrustRegion([W], lr=0.5, penalty=2.0 * schatten.maps.Nuclear(), scale="none")
        >>> W.grad = torch.zeros(2, 2)
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [0.5, 0.5]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        norm: Map | None = None,
        penalty: Map | None = None,
        iterations: int = 50,
        scale: str = "adamw-rms",
        **options: Any,
    ) -> None:
        step = CompositeStep(Nuclear() if norm is None else norm, penalty, iterations)
        # The ball's own direction is part of the retraction, so the map hands it the signal.
        rule = Rule(Momentum(nesterov=False), Power(1.0, over="entries"), Scale(scale), step)
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
