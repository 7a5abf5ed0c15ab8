"""Lion: the sign of a blend of gradient and momentum."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import L1
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import TwoBeta


class Lion(SpectralOptimizer):
    r"""Lion (Chen et al., arXiv 2302.06675): W <- W - lr (sign(S) + lambda W), for every parameter of a model.

        S = beta1 M + (1 - beta1) G,   M <- beta2 M + (1 - beta2) G,   W <- (1 - lr lambda) W - lr sign(S)

    It is Lion-K with K the sum of absolute entries, so with decay lambda it solves min F subject to |w| <= 1 / lambda for
    every entry. Under constant lr and betas it never converges: on theta^2 / 2 it ends in a two-cycle at +-lr / 2, so
    anneal lr (`schatten.schedules.lion_rate` gives the constants of the best known rate).

    Args:
        params: a module, all of which it trains, or tensors of any shape.
        lr: the largest change of an entry in one step; about a tenth to a third of AdamW's.
        weight_decay: decoupled decay lambda; about three to ten times AdamW's.
        betas: (beta1, beta2).
        decay: `"explicit"`, `"implicit"` or `"cautious"`, or a retraction.
        options: of `SpectralOptimizer`.

    No difference from the released code but what holds for every rule here: non-finite gradients are skipped and counted,
    half-precision parameters have fp32 state and stochastic rounding. State: one tensor per parameter.

    Example:
        >>> import torch, schatten
        >>> b = torch.nn.Parameter(torch.zeros(2))
        >>> opt = schatten.Lion([b], lr=0.5)
        >>> b.grad = torch.tensor([3.0, -4.0])
        >>> opt.step()
        >>> b.tolist()
        [-0.5, 0.5]
    """

    others = "spectral"

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        *,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        if not isinstance(params, nn.Module):
            options = {"layout": "flat", **options}
        rule = Rule(TwoBeta("paper"), L1(), Scale("none"), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, betas=betas, **options)
