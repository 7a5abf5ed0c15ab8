"""Simplified Muon: the exact polar factor of the gradient, with the step its convergence theory asks for."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import HalfNuclearSquared, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Gradient
from schatten.signals.core import check_switch
from schatten.solvers import svd


class SimplifiedMuon(SpectralOptimizer):
    r"""Simplified Muon (arXiv 2505.23737, algorithm 2; 2601.13474): W <- W - lr ||G||_* U V^T, without momentum.

        G = U Sigma V^T,   D = ||G||_* U V^T  (adaptive)   or   D = U V^T

    The adaptive step with lr = 1 / L_sp, L_sp the smoothness of F between spectral and nuclear norm, is steepest descent for
    the squared spectral norm: F falls by at least ||G||_*^2 / (2 L_sp), and to F* at rate O(L_sp D_op^2 / t) if F is
    star-convex (theorem 4.11). `adaptive=False` is the same optimizer as Muon(momentum=0, solver=svd(), scale="none"), whose
    constant lr must be annealed: it oscillates for ever at a distance of lr.

    With decay lambda the adaptive rule adds lambda/2 ||W||_op^2 to F, the other one constrains ||W||_op <= 1 / lambda.

    Args:
        params: a module, or matrices.
        lr: 1 / L_sp, or with `adaptive=False` the spectral norm of one update.
        weight_decay: decoupled decay lambda, 0 in the papers.
        adaptive: multiply by the gradient's nuclear norm.
        decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    Differences from the papers: decay is possible. No state. The polar factor is exact (`solvers.svd`), so this is for study,
    not for large matrices.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.SimplifiedMuon([W], lr=0.1)
        >>> W.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.7, -0.7]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        *,
        adaptive: bool = True,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        check_switch("adaptive", adaptive)
        map = HalfNuclearSquared(solver=svd()) if adaptive else Nuclear(svd())
        super().__init__(
            params, Rule(Gradient(), map, Scale("none"), named(decay)), lr=lr, weight_decay=weight_decay, **options
        )
