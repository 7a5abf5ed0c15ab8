"""Spectral powers of Adam's ratio: Adam, AdamS, AdamQ, AdamZ and everything between."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.optimizer import SpectralOptimizer
from schatten.powers import power_lr, power_scale, spectral_direction
from schatten.rule import Rule
from schatten.signals import AdamRatio
from schatten.solvers import FunctionSolver, Solver

# Best matrix learning rates of the paper's GPT-2 sweep (its figure data), by exponent.
PUBLISHED = ((0.0, 7e-3), (0.25, 2e-2), (0.5, 1e-2), (1.0, 4e-3))


class SpectralAdam(SpectralOptimizer):
    r"""SpectralAdam(p) (Qi et al., arXiv 2602.04669): U S^p V^T of Adam's bias-corrected ratio of moments O = U S V^T.

        M, V <- averages of G and G^2,   O = M' / (sqrt(V') + eps),   W <- (1 - lr lambda) W - lr c U S^p V^T

    p = 1 is Adam, 1/2 AdamS, 1/4 AdamQ and 0 AdamZ, any p in [-0.9, 1] is allowed. Decay implies what it does for
    `SpectralSGD` of the same p, F + lambda^(1/p)/q sum of sigma^q with q = 1 + 1/p, were O the momentum.

    Differences from the released code: those of `SpectralSGD`.

    Args:
        params: a module, or matrices.
        p: the exponent.
        lr: default the best of the released sweep of its p: 4e-3, 1e-2, 2e-2 and 7e-3 for 1, 1/2, 1/4 and 0, in between
            geometrically interpolated; with `normalize="rms"` 1e-3 for every p.
        weight_decay: decoupled decay lambda, 0 in the paper.
        betas: of the two moments.
        eps: added to the root of the second.
        normalize: None for the released factors, c = sqrt(max(1, fan_out / fan_in)) at p = 0 and 1 otherwise; `"rms"` makes
            the RMS of every update lr / 5, so that one lr serves all p.
        solver: how U S^p V^T is computed, default the map's own.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: two tensors per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.SpectralAdam([W], p=1, lr=0.1)
        >>> W.grad = torch.diag(torch.tensor([4.0, 9.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.1, -0.1]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        p: float = 0.5,
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        normalize: str | None = None,
        solver: Solver | FunctionSolver | None = None,
        **options: Any,
    ) -> None:
        if normalize:
            self.adamw_lr = None  # lr is in AdamW's units
        lr = power_lr(p, normalize, PUBLISHED) if lr is None else lr
        rule = Rule(AdamRatio(eps), spectral_direction(p, solver), power_scale(p, normalize))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, betas=betas, **options)
