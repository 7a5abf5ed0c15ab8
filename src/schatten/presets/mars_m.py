"""MARS-M: variance-reduced momentum as a practical Muon."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import VarianceReduced
from schatten.solvers import Solver, polynomial


class MARSM(SpectralOptimizer):
    r"""MARS-M (arXiv 2510.21800): Muon with AdamW's update RMS of the momentum of C = G + gamma beta / (1 - beta) (G - G').

        M <- beta M + (1 - beta) C,   W <- (1 - lr lambda) W - lr 0.2 sqrt(max(fan_out, fan_in)) U V^T of M

    G' is the gradient of the last step, the approximate form of the released code. As there the clip is off, although the
    paper's algorithm has it; `MuonMVR` has both clip and exact form. The constraint under decay is Muon's.

    Args:
        params: a module, or matrices.
        lr: learning rate in AdamW's units.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        gamma: strength of the correction in [0, 1].
        scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    State: two tensors per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.MARSM([W], lr=0.5, scale="none", solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.5, -0.5]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        gamma: float = 0.025,
        scale: str = "adamw-rms",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        signal = VarianceReduced(gamma, clip=False)
        rule = Rule(signal, Nuclear(polynomial() if solver is None else solver), Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
