"""Dion: orthonormal updates of low rank by one power iteration per step, with error feedback."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from schatten.directions import NoK, State
from schatten.maps.lifts import safe_norm
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Gradient


@dataclass(frozen=True)
class PowerIteration(NoK):
    """D = P Q^T of M + G, and M without the share of it that D stands for (equations: `Dion`). mu is group["momentum"].

    State: M, and Q of min(m, n) x ceil(rank min(m, n)). Raises ValueError for a rank outside (0, 1] or another variant.
    """

    rank: float = 0.25
    variant: Literal["dion", "orth"] = "dion"

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, (int, float)) or not 0 < self.rank <= 1:
            raise ValueError(f"rank must be a share of min(fan_out, fan_in) in (0, 1], got {self.rank!r}.")
        if self.variant not in ("dion", "orth"):
            raise ValueError(
                f"variant must be 'dion' (columns of Q normalised) or 'orth' (Q orthonormal), got {self.variant!r}."
            )

    def init(self, W: Tensor) -> dict[str, Tensor]:
        short = min(W.shape[-2:])
        columns = math.ceil(self.rank * short)
        return {"momentum_buffer": torch.zeros_like(W), "right": W.new_zeros(*W.shape[:-2], short, columns)}

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        wide = S.shape[-2] < S.shape[-1]
        B = state["momentum_buffer"] + S
        B = B.mT if wide else B
        Q = state["right"]
        Q = torch.where(state["step"] == 1, torch.eye(*Q.shape[-2:], dtype=Q.dtype, device=Q.device), Q)
        P = torch.linalg.qr(B @ Q)[0]
        R = B.mT @ P
        M = B - (1 - group["momentum"]) * (P @ R.mT)
        size = safe_norm(R, -2)
        if self.variant == "orth":
            new, T = torch.linalg.qr(R)
            # Householder's QR may have negative diagonal entries, and D would ascend along those columns.
            size = T.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
            new, size = torch.where(size < 0, -new, new), size.abs()
        else:
            new = R / torch.where(size > 0, size, 1.0)
        # Where B has a smaller rank than Q, R holds rounding errors, which must not become unit columns.
        known = size > max(S.shape[-2:]) ** 0.5 * torch.finfo(R.dtype).eps * size.amax(-1, keepdim=True)
        D = P @ torch.where(known, new, 0.0).mT
        Q = torch.where(known, new, Q)
        return (D.mT if wide else D), {"momentum_buffer": M.mT if wide else M, "right": Q}


class Dion(SpectralOptimizer):
    r"""Dion (Ahn, Xu, Abreu and Langford, arXiv 2504.05295): an orthonormal update of rank r for tall B, wide ones transposed.

        B = M + G,   P = qr(B Q),   R = B^T P,   M <- B - (1 - mu) P R^T,   Q <- columns of R normalised,   D = P Q^T
        W <- (1 - lr lambda) W - lr sqrt(fan_out / fan_in) D

    One power iteration per step, from the last step's Q, finds the largest directions of B; only what they carry decays by
    mu, the rest of B waits in M (error feedback). `variant="orth"` takes Q from qr(R), so that all singular values of D are
    1; of "dion" they are those of Q, whose columns have length 1. At full rank M = mu (M + G): Muon's sum of momentum.

    Differences from the released code: Q starts with the first coordinate vectors instead of Gaussian ones, the same on
    every rank; QR is Householder's, not a randomised Cholesky one; columns of R at rounding level give no direction, as
    with Muon, instead of a unit one, and keep their column of Q; there is no low-rank communication.

    ||D||_op <= sqrt(r), for "orth" 1, so decay keeps ||W||_op <= c sqrt(r) / lambda, or c / lambda; where in that ball
    weights settle is the solution of no fixed problem.

    Args:
        params: a module, or matrices.
        lr: default the release's.
        weight_decay: decoupled decay lambda, default the release's.
        momentum: mu.
        rank: r as a share of min(fan_out, fan_in) in (0, 1], rounded up. The release's default is 1; its authors find 1/4
            nearly equivalent at 3B parameters, and less at smaller scale.
        variant: `"dion"` or `"orth"`.
        scale, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix, and r numbers for each row or column of its shorter side.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(6, 4))
        >>> opt = schatten.Dion([W], rank=0.5, lr=0.1)
        >>> W.grad = torch.randn(6, 4)
        >>> opt.step()
        >>> int(torch.linalg.matrix_rank(W))
        2
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        *,
        rank: float = 0.25,
        variant: Literal["dion", "orth"] = "dion",
        scale: str = "mup",
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        rule = Rule(Gradient(), PowerIteration(rank, variant), Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
