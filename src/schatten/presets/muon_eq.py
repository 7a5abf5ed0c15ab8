"""MuonEq: rows or columns of the signal brought to one length before the polar factor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from schatten.directions import NoK, State
from schatten.maps import Map, Nuclear
from schatten.maps.lifts import safe_norm
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial

# The dimensions that norms are taken over, of a signal (..., fan_out, fan_in).
DIMS = {"rows": (-1,), "columns": (-2,), "both": (-1, -2)}

# The shortest row or column, beside the largest entry, that is brought to full length: 1 / (r_i c_j) stays within fp32.
SHORTEST = 1e-30


@dataclass(frozen=True)
class Equilibrated(NoK):
    """D = grad K(X), X the signal S with its rows, its columns or both divided by their norms in S.

        form="rows":  X_ij = S_ij / r_i      "columns":  X_ij = S_ij / c_j      "both":  X_ij = S_ij / (r_i c_j)

    r_i and c_j are the l2 norms of S's own rows and columns: "both" is one simultaneous pass, not one after the other, so
    neither norm is 1 after it. A zero row or column stays zero.

    Raises ValueError for another form.
    """

    form: Literal["rows", "columns", "both"] = "rows"
    map: Map = field(default_factory=Nuclear)

    def __post_init__(self) -> None:
        if self.form not in DIMS:
            raise ValueError(f"form must be one of {', '.join(map(repr, DIMS))}, got {self.form!r}.")

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        largest = S.abs().amax((-2, -1), keepdim=True)
        X = S / torch.where(largest > 0, largest, 1.0)
        # All norms before the first division: "both" is simultaneous.
        for size in [safe_norm(X, dim).clamp(min=SHORTEST) for dim in DIMS[self.form]]:
            X = X / size
        return self.map.grad(X), {}


class MuonEq(SpectralOptimizer):
    r"""MuonEq (Chang et al., arXiv 2603.28254): Muon of the momentum with its rows, or rows and columns, equilibrated.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   X = S_ij / r_i  or  S_ij / (r_i c_j),   D = msign(X)
        W <- (1 - lr lambda) W - lr c(shape) D

    With r_i and c_j the norms of S's rows and columns. The default, the paper's R, makes D blind to the scale of every single
    output's gradient. D is no gradient of a convex K, so decay implies no problem, but of an exact solver ||D||_op <= 1, so
    decay lambda still ends in ||W||_op <= c / lambda.

    Differences from the released code: no 1e-8 is added to the squared norms, which would leave the rows of small gradients
    (norm below 1e-4) as they are; the solver (a minimax polynomial); one form for the whole run, no switch from RC to R.

    Args:
        params: a module, or matrices.
        lr: learning rate, with the default scale AdamW's.
        weight_decay: decoupled decay lambda.
        momentum: beta.
        form: `"rows"` (R), `"columns"` (C) or `"both"` (RC).
        nesterov, scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(3, 1))
        >>> opt = schatten.MuonEq([W], lr=1.0, scale="none", solver=schatten.solvers.svd())
        >>> W.grad = torch.tensor([[1.0], [2.0], [-2.0]])
        >>> opt.step()
        >>> [round(w, 4) for w in W.flatten().tolist()]
        [-0.5774, -0.5774, 0.5774]
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        form: Literal["rows", "columns", "both"] = "rows",
        nesterov: bool = True,
        scale: str = "adamw-rms",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        direction = Equilibrated(form, Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Momentum(nesterov=nesterov), direction, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
