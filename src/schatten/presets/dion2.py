"""Dion2: Muon on the heaviest rows or columns of a momentum sum, whose others wait."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schatten.directions import NoK, State
from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import Retraction, named
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Gradient
from schatten.solvers import Solver, polynomial


@dataclass(frozen=True)
class HeaviestSlices(NoK):
    """D = msign(U) in the chosen slices of M + G, 0 elsewhere (equations: `Dion2`). mu is group["momentum"].

    State: M. Raises ValueError for a fraction outside (0, 1].
    """

    fraction: float = 0.25
    map: Nuclear = field(default_factory=Nuclear)

    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction!r}.")

    def init(self, W: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(W)}

    def __call__(self, S: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        m, n = S.shape[-2:]
        chosen, along = (-2, -1) if m <= n else (-1, -2)
        M = state["momentum_buffer"] + S
        index = M.abs().sum(along).topk(math.ceil(self.fraction * min(m, n)), sorted=False).indices.unsqueeze(along)
        index = index.expand(*(-1,) * (index.ndim - 2), *((-1, n) if chosen == -2 else (m, -1)))
        U = M.gather(chosen, index)
        D = torch.zeros_like(M).scatter(chosen, index, self.map.grad(U))
        return D, {"momentum_buffer": M.scatter(chosen, index, U * group["momentum"])}


class Dion2(SpectralOptimizer):
    r"""Dion2 (Ahn, Amsel and Langford, arXiv 2512.16928): Muon on a share of the rows, or columns, of each matrix.

        M <- M + G,   U = the k slices of M along its shorter side with the largest l1 norms,   U's place in M <- mu U
        W <- (1 - lr lambda) W,   then U's place in W <- itself - lr sqrt(fan_out / fan_in) msign(U)

    k = ceil(fraction min(fan_out, fan_in)). Slices that are not chosen gather gradients undecayed until they are; decay is of
    all of W. `fraction=1` is Muon with the sum M <- mu M + G, without Nesterov.

    Differences from the released code: the solver (a minimax polynomial in the state's precision on U itself, not U rounded
    to bf16); slices are chosen of the whole matrix, not of each shard.

    ||D||_op = 1, so decay keeps ||W||_op <= c / lambda; only for `fraction=1` is W the solution of a problem, Muon's.

    Args:
        params: a module, or matrices.
        lr: default the release's; its configurations go to 0.02.
        weight_decay: decoupled decay lambda, default the release's.
        momentum: mu.
        fraction: the share of slices in (0, 1]; the release's configurations have 0.25 and 0.5.
        scale, solver, decay: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 3))
        >>> opt = schatten.Dion2([W], fraction=0.5, lr=0.1)
        >>> W.grad = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
        >>> opt.step()
        >>> W.count_nonzero(-1).tolist()
        [0, 1]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.01,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        *,
        fraction: float = 0.25,
        scale: str = "mup",
        solver: Solver | None = None,
        decay: str | Retraction = "explicit",
        **options: Any,
    ) -> None:
        direction = HeaviestSlices(fraction, Nuclear(polynomial() if solver is None else solver))
        rule = Rule(Gradient(), direction, Scale(scale), named(decay))
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)
