"""Stationarity: how far a weight is from solving the problem that its rule's decay implies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.fenchel_young import CHEAP, fenchel_young, implied, settled
from schatten.maps import Map, Sum
from schatten.solvers import Solver

__all__ = ["QUANTITY", "Stationarity", "frank_wolfe_gap", "kkt_residual"]


def kkt_residual(
    map: Map, weight: Tensor, grad: Tensor, weight_decay: float, factor: float = 1.0, *, solver: Solver | None = None
) -> tuple[Tensor, Tensor]:
    """(residual, violation) of F(W) + (1/lambda) (cK)*(lambda W): W is stationary where both are 0.

        residual  = c K(-G) + c K*(lambda W / c) + <lambda W, G>,   G = grad F(W)
        violation = the map's, of lambda W / c: 0 inside the set where K* is finite

    For Muon, K the nuclear norm, that is c ||G||_nuc + <lambda W, G> and max(lambda ||W||_op / c - 1, 0), the KKT score and
    the constraint of arXiv 2506.15054, eq. 6 with a shape factor c; for other K it is the residual of the Fenchel-Young
    inequality, so it is not negative where the violation is 0. Outside, where K* is infinite, K* counts at the largest
    multiple t lambda W / c inside: 0 for every norm K, so Muon's formula holds everywhere, and may be negative there. Of a
    `Sum` of maps the residual outside is infinite.

    Args:
        map: K. Multiples may be in it or in `factor`; the violation is that of the map without multiples.
        weight: (*b, m, n).
        grad: gradients of F, same shape, of a batch so large that its noise counts little: noise Z adds about c K(Z).
        weight_decay: lambda of the decoupled decay; 0 leaves c K(-G).
        factor: c, the shape factor.
        solver: for the nuclear norm, find ||G||_nuc as <G, polar factor> and ||W||_op by power iteration from below.
            A solver within delta of the polar factor is off by at most delta c ||G||_nuc; `polynomial(tol=1e-3, lower=1e-4)`
            by 1e-3 c ||G||_nuc and at most 1e-4 c ||G||_F for each singular value below 1e-4 ||G||_F.

    Returns fp64 tensors (*b); the residual has the units of F per lr, the violation none. Cost: an SVD each of weight and grad
    in fp64 for a spectral K, none with `solver`. Raises ValueError for shapes that differ, weight_decay < 0, factor <= 0, and
    for a threshold relative to each signal, which has no K.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.stationarity import kkt_residual
        >>> K, G = schatten.maps.Nuclear(), torch.diag(torch.tensor([1.0, 2.0]))
        >>> W = -torch.eye(2) / 0.5  # on the boundary of the ball of radius 1 / 0.5, as far along -G as it can be
        >>> [float(x) for x in kkt_residual(K, W, G, weight_decay=0.5)]
        [0.0, 0.0]
        >>> [float(x) for x in kkt_residual(K, 0 * W, G, weight_decay=0.5)]
        [3.0, 0.0]
    """
    _check(weight, grad, weight_decay, factor)
    found = fenchel_young(map, weight, grad, weight_decay, factor, solver=solver)
    return found.residual, found.violation


def frank_wolfe_gap(
    map: Map, weight: Tensor, grad: Tensor, weight_decay: float, factor: float = 1.0, *, solver: Solver | None = None
) -> Tensor:
    """The `kkt_residual` over lambda, (*b) in fp64, in units of F.

    For a norm K it is the Frank-Wolfe gap of F over the set that decay implies, max <W - X, G> over X in it: within the set
    and for convex F no point of it is lower by more. For other K it is the same for F + (1/lambda) (cK)*(lambda W).

    Arguments, cost and errors as of `kkt_residual`; raises ValueError for weight_decay = 0 as well.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.stationarity import frank_wolfe_gap
        >>> K, G = schatten.maps.Nuclear(), torch.diag(torch.tensor([1.0, 2.0]))
        >>> float(frank_wolfe_gap(K, torch.zeros(2, 2), G, weight_decay=0.5))
        6.0
    """
    if not weight_decay > 0:
        raise ValueError(
            f"A Frank-Wolfe gap needs the set that decay implies, weight_decay > 0, got weight_decay={weight_decay}."
        )
    return kkt_residual(map, weight, grad, weight_decay, factor, solver=solver)[0] / weight_decay


@dataclass(frozen=True)
class Stationarity:
    """Logs the `kkt_residual` of each matrix, also relative to c K(G), and the Frank-Wolfe gap.

    For rules on a `Map` with `DecoupledDecay` whose signal averages gradients; others solve no such problem and log nothing,
    nor do sums of maps, whose conjugate is found by iteration. Where a signal sums gradients, G is their sum at rest and the
    residual divided by the same. `solver` is for the nuclear norm; None finds it by SVD.
    """

    solver: Solver | None = field(default=CHEAP)

    name: ClassVar[str] = "stationarity"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    columns: ClassVar[Mapping[str, str]] = {
        "residual": "KKT residual c K(-G) + c K*(lambda W / c) + <lambda W, G>, 0 where stationary; loss per unit of lr",
        "relative": "the residual over c K(G); without unit, within [0, 2] inside the ball of a norm",
        "violation": "how far lambda W / c is outside the set where K* is finite; without unit, 0 inside",
        "gap": "the residual over lambda, the Frank-Wolfe gap; in units of the loss",
    }
    cost: ClassVar[str] = "one polar factor for the nuclear norm, two SVDs in fp64 for other spectral K"

    def __call__(self, block: Block) -> Mapping[str, Tensor]:
        problem, gain = implied(block), settled(block.rule.signal, block.group)
        if problem is None or gain is None or isinstance(problem.map, Sum):
            return {}
        if block.gradient is None or block.group.get("maximize"):
            return {}
        map, decay, factor, _ = problem
        found = fenchel_young(map, block.weight, gain * block.gradient, decay, factor, solver=self.solver)
        residual = found.residual / gain
        columns = {"residual": residual, "relative": found.residual / torch.where(found.value == 0, 1, found.value)}
        return {**columns, "violation": found.violation, "gap": residual / decay} if decay else columns


QUANTITY = Stationarity


def _check(weight: Tensor, grad: Tensor, weight_decay: float, factor: float) -> None:
    if weight.shape != grad.shape or weight.ndim < 2:
        raise ValueError(
            f"weight and grad must be matrices of one shape (*b, m, n), got {tuple(weight.shape)} and {tuple(grad.shape)}."
        )
    if not weight_decay >= 0 or not factor > 0:
        raise ValueError(f"weight_decay must be at least 0 and factor positive, got {weight_decay} and {factor}.")
