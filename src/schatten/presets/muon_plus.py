"""Muon+: rows and columns of the polar factor normalised."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from schatten.directions import NoK, State
from schatten.maps import Map, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial

# What is divided by its norm in turn: (fan_out, fan_in) summed over the last dimension gives rows.
DIMS = {"row": (-1,), "col": (-2,), "col_row": (-2, -1), "row_col": (-1, -2)}


@dataclass(frozen=True)
class Normalised(NoK):
    """D = grad K(S) with its rows (`"row"`), columns (`"col"`) or both in that order divided by sqrt(norm^2 + eps).

    eps keeps what is rounding noise, the rows of a deficient S, from becoming unit rows. Only what is normalised last has
    norm 1. Raises ValueError for another `norm` or a negative eps.
    """

    norm: Literal["row", "col", "col_row", "row_col"] = "col_row"
    map: Map = field(default_factory=Nuclear)
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if self.norm not in DIMS:
            raise ValueError(f"norm must be one of {', '.join(map(repr, DIMS))}, got {self.norm!r}.")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"eps must be finite and > 0, got {self.eps}.")

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        D = self.map.grad(S)
        for dim in DIMS[self.norm]:
            D = D / (D.square().sum(dim, keepdim=True) + self.eps).sqrt()
        return D, {}


class MuonPlus(SpectralOptimizer):
    r"""Muon+ (Zhang et al., arXiv 2602.21545): Muon's polar factor with its rows and columns brought to l2 norm 1.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   P = msign(S)
        D = P, its columns and then its rows normalised,   W <- (1 - lr lambda) W - lr sqrt(fan_out / fan_in) D

    The rows of a wide full-rank P and the columns of a tall one have norm 1 already. D is no gradient of a convex K: decay
    implies no constraint.

    Differences from the released code: the solver (a minimax polynomial), and momentum is an average, not a sum, which P does
    not see.

    Args:
        params: a module, or matrices.
        lr: default that of the released GPT-small configuration; the others have 0.04 (LLaMA 60M) and 0.1 (350M).
        weight_decay: decoupled decay lambda; 0.1 there, 0.05 in LLaMA 60M.
        momentum: beta.
        norm: `"row"`, `"col"`, `"col_row"` (columns first) or `"row_col"`.
        nesterov, scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 1))
        >>> opt = schatten.MuonPlus([W], lr=1.0, scale="none")
        >>> W.grad = torch.tensor([[1.0], [-20.0]])
        >>> opt.step()
        >>> [round(w, 4) for w in W.flatten().tolist()]
        [-1.0, 1.0]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        norm: Literal["row", "col", "col_row", "row_col"] = "col_row",
        nesterov: bool = True,
        scale: str = "mup",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        direction = Normalised(norm, Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Momentum(nesterov=nesterov), direction, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
