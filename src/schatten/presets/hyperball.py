"""Hyperball: Muon on the sphere of the initial Frobenius norm."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from schatten.maps import Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import FixedNorm
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.solvers import Solver, polynomial


class Hyperball(SpectralOptimizer):
    r"""Hyperball, MuonH (Wen et al., arXiv 2606.16899): Muon that keeps ||W||_F and turns W by a fixed angle a step.

        M <- beta M + (1 - beta) G,   S = (1 - beta) G + beta M,   D = msign(S)
        W' = W - lr R D / ||D||_F,   W <- R W' / ||W'||_F,   R = ||W_0||_F of every matrix

    lr is the angle in radians, to first order, whatever the shape: there is no shape factor. It solves min F on the sphere
    ||W||_F = R, so R, the initialisation, is a choice that stays. A matrix that starts at zero gets the norm of its first
    step, lr ||D||_F, and keeps that: give output projections a nonzero start (the benchmark's has the standard deviation 0.026
    in attention and 0.031 in the MLP).

    Differences from the released code: a step is lr R long where the benchmark's is lr ||W||_F, the same up to rounding, but
    it gets a matrix away from zero; the solver is a minimax polynomial.

    Args:
        params: a module, or matrices.
        lr: default the released one, to fall linearly to zero over the whole run.
        weight_decay: 0 for matrices, whose norm is fixed; an AdamW group may have its own.
        momentum: beta.
        nesterov, solver: see `Muon`.
        options: of `SpectralOptimizer`; AdamW groups have lr 3e-4 unless `adamw={"lr": ...}` says otherwise.

    State: one tensor and one number per matrix. Raises ValueError for a weight decay of matrices.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> opt = schatten.Hyperball([W], lr=0.8, solver=schatten.solvers.svd())
        >>> W.grad = torch.tensor([[0.0, 7.0]])
        >>> opt.step()
        >>> [round(w, 4) for w in W.flatten().tolist()]
        [5.0, 0.0]
    """

    adamw_lr = 3e-4

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 0.018,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        solver: Solver | None = None,
        **options: Any,
    ) -> None:
        polar = Nuclear(polynomial() if solver is None else solver)
        rule = Rule(Momentum(nesterov=nesterov), polar, Scale("none"), FixedNorm())
        super().__init__(params, rule, lr=lr, weight_decay=weight_decay, momentum=momentum, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """`SpectralOptimizer.add_param_group`, refusing weight decay of matrices, which nothing would use."""
        if isinstance(param_group, dict) and param_group.get("algorithm", "spectral") == "spectral":
            decay = param_group.get("weight_decay", self.defaults["weight_decay"])
            if (isinstance(decay, Tensor) and decay.numel() != 1) or decay != 0:
                raise ValueError(
                    f"weight_decay must be 0 for matrices, whose norm Hyperball fixes, got {decay}: leave it out, or give it "
                    f"to AdamW groups alone."
                )
        super().add_param_group(param_group)
