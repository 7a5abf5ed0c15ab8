"""Spectral powers of momentum: mSGD, mSGDS, mSGDQ, mSGDZ and everything between."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.optimizer import SpectralOptimizer
from schatten.powers import power_lr, power_scale, spectral_direction
from schatten.rule import Rule
from schatten.signals import Momentum
from schatten.solvers import FunctionSolver, Solver

# Best matrix learning rates of the paper's GPT-2 sweep (its figure data), by exponent.
PUBLISHED = ((0.0, 0.007), (0.25, 0.04), (0.5, 0.2), (1.0, 5.0))


class SpectralSGD(SpectralOptimizer):
    r"""SpectralSGD(p) (Qi et al., arXiv 2602.04669): W <- (1 - lr lambda) W - lr c U S^p V^T of the momentum sum M = U S V^T.

        M <- beta M + G,   D = U S^p V^T,   W <- (1 - lr lambda) W - lr c D

    p = 1 is mSGD (SGD with momentum), 1/2 mSGDS, 1/4 mSGDQ and 0 mSGDZ (Muon), any p in [-0.9, 1] is allowed. D is the
    gradient of K = sum of s^(1+p) / (1+p), so decay lambda solves min F + lambda^(1/p)/q sum of sigma^q with q = 1 + 1/p;
    p = 0 is the constraint ||W||_op <= c / lambda, below it there is no convex K.

    Differences from the released code: p = 1/2 and 1/4 come from one polynomial tower instead of 30 and 60 coupled
    iterations with an absolute ridge, so c G gives c^p times the direction at every scale; the polar factor is a minimax
    polynomial, not 15 steps of Keller's quintic in bf16; what is no hidden matrix is trained by AdamW, embeddings included.

    Args:
        params: a module, or matrices.
        p: the exponent.
        lr: default the best of the released sweep of its p: 5, 0.2, 0.04 and 0.007 for 1, 1/2, 1/4 and 0, in between
            geometrically interpolated; with `normalize="rms"` 1e-3 for every p.
        weight_decay: decoupled decay lambda, 0 in the paper.
        momentum: beta of the sum.
        normalize: None for the released factors, c = sqrt(max(1, fan_out / fan_in)) at p = 0 and 1 otherwise; `"rms"` makes
            the RMS of every update lr / 5, AdamW's, so that one lr serves all p.
        solver: how U S^p V^T is computed, default the map's own.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.SpectralSGD([W], p=0.5, lr=0.1, solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([4.0, 9.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.2, -0.3]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        p: float = 0.0,
        lr: float | Tensor | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        normalize: str | None = None,
        solver: Solver | FunctionSolver | None = None,
        **options: Any,
    ) -> None:
        if normalize:
            self.adamw_lr = None  # lr is in AdamW's units
        lr = power_lr(p, normalize, PUBLISHED) if lr is None else lr
        rule = Rule(Momentum("sum", nesterov=False), spectral_direction(p, solver), power_scale(p, normalize))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
