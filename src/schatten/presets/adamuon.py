"""AdaMuon: Muon on signs, divided entry by entry by its own second moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schatten.directions import NoK, State
from schatten.maps import Map, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import RMS
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class EntryMoment(NoK):
    """D = P / (sqrt(V) + eps) of P = grad K(sign(S)), V a running average of the squares of P's entries.

        V <- beta V + (1 - beta) P^2,   beta = group["momentum"], the momentum's own

    State: V, one tensor of the matrix's shape.
    """

    map: Map = field(default_factory=Nuclear)
    eps: float = 1e-8

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"exp_avg_sq": torch.zeros_like(W)}

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        P = self.map.grad(S.sign())
        V = torch.lerp(state["exp_avg_sq"], P.square(), 1 - group["momentum"])
        return P / (V.sqrt() + self.eps), {"exp_avg_sq": V}


class AdaMuon(SpectralOptimizer):
    r"""AdaMuon (Si, Zhang and Shen, arXiv 2507.11005): the polar factor of signs, made adaptive entry by entry as in Adam.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   P = msign(sign(S))
        V <- beta V + (1 - beta) P^2,   D = P / (sqrt(V) + 1e-8),   W <- (1 - lr lambda) W - lr 0.2 sqrt(mn) / ||D||_F D

    Every update has RMS 0.2 lr, AdamW's, so V needs no bias correction: a common factor of D changes nothing. The first step is
    0.2 lr times the sign of P. D is no gradient of a convex K: decay implies no constraint.

    Differences from the released code: the solver (a minimax polynomial), and a zero update stays zero without an eps in the
    rescaling. An earlier release had no sign, and a V of its own decay 0.999 with bias correction.

    Args:
        params: a module, or matrices.
        lr: learning rate, AdamW's; default that of the released GPT-2 small.
        weight_decay: decoupled decay lambda, likewise.
        momentum: beta, the decay of both averages.
        nesterov, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    State: two tensors per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(3, 1))
        >>> opt = schatten.AdaMuon([W], lr=1.0)
        >>> W.grad = torch.tensor([[1.0], [20.0], [-0.3]])
        >>> opt.step()
        >>> [round(w, 4) for w in W.flatten().tolist()]
        [-0.2, -0.2, 0.2]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 6e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        direction = EntryMoment(Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Momentum(nesterov=nesterov), direction, RMS(0.2), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
