"""NorMuon: Muon whose rows, one per neuron, keep their own second moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schatten.directions import NoK, State, rescaled
from schatten.maps import Map, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class RowMoment(NoK):
    """D = P / (sqrt(v) + eps) at the Frobenius norm of P = grad K(S), v a running average of the mean square of P's rows.

        v <- beta2 v + (1 - beta2) mean over columns of P^2,   beta2 = group["beta2"]

    State: v, (fan_out, 1).
    """

    map: Map = field(default_factory=Nuclear)
    eps: float = 1e-10

    hyperparameters: ClassVar[tuple[str, ...]] = ("beta2",)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_row_sq": W.new_zeros(*W.shape[:-1], 1)}

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        P = self.map.grad(S)
        v = torch.lerp(state["exp_avg_row_sq"], P.square().mean(-1, keepdim=True), 1 - group["beta2"])
        D = P / (v.sqrt() + self.eps)
        before, after = (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) for X in (P, D))
        return rescaled(D, after, before), {"exp_avg_row_sq": v}


class NorMuon(SpectralOptimizer):
    r"""NorMuon (Li et al., arXiv 2510.05491): Muon's polar factor with each row divided by the root of its second moment.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   P = msign(S)
        v <- beta2 v + (1 - beta2) mean over columns of P^2,   D = P / (sqrt(v) + 1e-10) at ||P||_F
        W <- (1 - lr lambda) W - lr c(shape) D

    The rows of a wide full-rank P have norm 1 already, so with an exact solver only tall matrices, and deficient ones,
    differ from Muon's. D is no gradient of a convex K: decay implies no constraint.

    Differences from the released code: the solver (a minimax polynomial); a zero signal gives a zero update without an eps
    in the rescaling; a parameter without a gradient is left alone, where the released code steps it by a zero gradient. The
    scale is the code's; the paper's text has 0.2 sqrt(mn) / ||D||_F, which for a full-rank P is `"adamw-rms"`.

    Args:
        params: a module, or matrices.
        lr: default the released one; with the default scale Keller's.
        weight_decay: decoupled decay lambda, 0 in the released code.
        momentum: beta.
        beta2: the decay of v; the step is Muon's as long as all entries of v are equal.
        nesterov, scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix, and one number per row.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(3, 1))
        >>> opt = schatten.NorMuon([W], lr=1.0, scale="none", solver=schatten.solvers.svd())
        >>> W.grad = torch.tensor([[1.0], [2.0], [-2.0]])
        >>> opt.step()
        >>> [round(w, 4) for w in W.flatten().tolist()]
        [-0.5774, -0.5774, 0.5774]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        *,
        nesterov: bool = True,
        scale: str = "keller",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        direction = RowMoment(Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Momentum(nesterov=nesterov), direction, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, beta2=beta2, **options)
