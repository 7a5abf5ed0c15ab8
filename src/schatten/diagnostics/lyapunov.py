"""Lyapunov: the function that falls where the loss may not, of a rule with momentum and decoupled decay.

A rule on K with two betas, decay lambda and factor c minimises F(X) + (1/lambda) (cK)*(lambda X). Its loss may rise while
momentum turns; what falls, up to the curvature of one step, is

    V_K(X, M) = F(X) - F* + (1/lambda) (cK)*(lambda X) + C [ c K(M) + (cK)*(lambda X) + <lambda X, M> ]
    C = lr beta1 / ((1 - beta2) + lr lambda (1 - beta1))                  implicit decay, beta1 <= beta2

(arXiv 2506.15054 for the nuclear norm, whose K* is 0 in the ball; its C derived here, as is the rest.) M is the library's
average of the gradient, which a step subtracts; the paper averages the negative gradient and so writes -<lambda X, M>. An
explicit step of length lr is an implicit one of length lr / (1 - lr lambda), which gives explicit decay the same function.
Outside the ball V_B (`schatten.diagnostics.constraint`) falls first, then V_K.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Need, Whole
from schatten.diagnostics.fenchel_young import CHEAP, fenchel_young, implied, settled
from schatten.diagnostics.undisturbed import devices_of, undisturbed
from schatten.maps import Map, Sum
from schatten.retractions.core import lr_of
from schatten.signals import Gradient, Momentum, Signal, TwoBeta
from schatten.solvers import Solver

__all__ = [
    "QUANTITY",
    "ChangeBound",
    "Growth",
    "Lyapunov",
    "betas_of",
    "first_growth",
    "lyapunov",
    "lyapunov_change_bound",
    "lyapunov_constant",
]

Decay = Literal["explicit", "implicit"]


class ChangeBound(NamedTuple):
    """The three terms that bound the change of V_K in a step, (*b) each, and their sum.

    `residual` and `monotone` are at most 0; `curvature` at least.
    """

    residual: Tensor
    monotone: Tensor
    curvature: Tensor

    @property
    def total(self) -> Tensor:
        return self.residual + self.monotone + self.curvature


class Growth(NamedTuple):
    """Where a pair of sequences that must not grow does: between `step` - 1 and `step`, `name` by `amount`."""

    step: int
    name: Literal["V_B", "V_K"]
    amount: float


def lyapunov_constant(
    lr: float | Tensor, weight_decay: float, betas: tuple[float, float], *, decay: Decay = "implicit"
) -> float | Tensor:
    """C = lr beta1 / ((1 - beta2) + lr lambda (1 - beta1)), what V_K multiplies its momentum part with, in units of lr.

    That is c / lambda in arXiv 2506.15054's V_K. For explicit decay lr stands for lr / (1 - lr lambda), so that
    C = lr beta1 / ((1 - lr lambda) (1 - beta2) + lr lambda (1 - beta1)).

    Args:
        betas: (beta1, beta2) of the paper's form, `schatten.signals.TwoBeta`; `betas_of` has those of other signals.

    Raises ValueError unless 0 <= beta1 <= beta2 < 1, without which V_K need not fall, for lr or weight_decay < 0, and for
    explicit decay with lr lambda >= 1.

    Example:
        >>> from schatten.diagnostics.lyapunov import lyapunov_constant
        >>> round(lyapunov_constant(0.1, 0.5, (0.81, 0.9)), 4)  # Nesterov momentum 0.9
        0.7397
    """
    beta1, beta2 = betas
    if not 0 <= beta1 <= beta2 < 1:
        raise ValueError(f"V_K needs 0 <= beta1 <= beta2 < 1, got betas={betas}.")
    step = _implicit_lr(lr, weight_decay, decay)
    return step * beta1 / ((1 - beta2) + step * weight_decay * (1 - beta1))


def lyapunov(
    map: Map,
    weight: Tensor,
    momentum: Tensor,
    loss: Tensor | float,
    lr: float | Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    factor: float = 1.0,
    minimum: float = 0.0,
    *,
    decay: Decay = "implicit",
    solver: Solver | None = None,
) -> Tensor:
    """V_K(W, M) = F - F* + (1/lambda) (cK)*(lambda W) + C [c K(M) + (cK)*(lambda W) + <lambda W, M>], (*b) in fp64.

    On deterministic runs of constant lr, from weights in the domain of K*(lambda W / c), it falls in each step but for at most
    `lyapunov_change_bound`'s curvature, lr^2 L / 2 times the squared Frobenius length of the step over lr. Where K* is
    infinite it counts as `kkt_residual` counts it, and nothing is promised. Noise in the gradients makes V_K rise.

    Args:
        map: K.
        weight, momentum: W and M after the same step, (*b, m, n). M averages the gradient (beta2), as the library's does.
        loss: F(W), a number or (*b). For several matrices add up what V_K has beside F - F*: `loss=0`.
        lr, weight_decay, betas, decay: as of `lyapunov_constant`.
        factor: c, the shape factor.
        minimum: F*; any number serves to see whether V_K falls.
        solver: for the nuclear norm: find ||M||_nuc by it, as `nuclear_norm` does.

    Cost: an SVD in fp64 each of W and M for a spectral K; one polar factor with `solver`. Raises as `lyapunov_constant`.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.lyapunov import lyapunov
        >>> K, W, M = schatten.maps.Nuclear(), torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))
        >>> round(float(lyapunov(K, W, M, loss=3.0, lr=0.1, weight_decay=0.5, betas=(0.81, 0.9))), 4)  # 3 + 0.7397 * 2
        4.4795
    """
    C = lyapunov_constant(lr, weight_decay, betas, decay=decay)
    found = fenchel_young(map, weight, momentum, weight_decay, factor, solver=solver)
    regulariser = found.conjugate / weight_decay if weight_decay else 0.0
    return loss - minimum + regulariser + C * found.residual


def lyapunov_change_bound(
    map: Map,
    weight: Tensor,
    momentum: Tensor,
    grad: Tensor,
    smoothness: float | Tensor,
    lr: float | Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    factor: float = 1.0,
    *,
    decay: Decay = "implicit",
) -> ChangeBound:
    """What V_K changes by, at most, in the step from (W, M) with the gradient G = grad F(W); terms (*b) in fp64.

        N = beta1 M + (1 - beta1) G,   M+ = beta2 M + (1 - beta2) G,   W+ = (W - lr c grad K(N)) / (1 + lr lambda)

        V_K(W+, M+) - V_K(W, M) <= - lr (1 + lambda C) [c K(N) + (cK)*(lambda W+) + <lambda W+, N>]      residual
                                   - C <M - M+, c grad K(M+) - c grad K(N)>                              monotone
                                   + L lr^2 / 2 ||c grad K(N) + lambda W+||_F^2                          curvature

    for F with gradients that are L-Lipschitz in the Frobenius norm (`smoothness`) and W in the domain of K*. For explicit
    decay lr is lr / (1 - lr lambda) throughout. Directions are the map's, so a solver that is not exact loosens the bound.

    Cost: two directions and, for a spectral K, two SVDs in fp64. Raises as `lyapunov_constant`.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.lyapunov import lyapunov_change_bound
        >>> K, W = schatten.maps.Nuclear(schatten.solvers.svd()), torch.eye(2)
        >>> bound = lyapunov_change_bound(K, W, 0 * W, W, smoothness=1.0, lr=0.1, weight_decay=0.5, betas=(0.0, 0.0))
        >>> bool(bound.total < 0), bool(bound.monotone == 0)  # from I along -I on ||W||_F^2 / 2
        (True, True)
    """
    C = lyapunov_constant(lr, weight_decay, betas, decay=decay)
    step = _implicit_lr(lr, weight_decay, decay)
    beta1, beta2 = betas
    W, M, G = weight.double(), momentum.double(), grad.double()
    N, after = torch.lerp(G, M, beta1), torch.lerp(G, M, beta2)
    D, D_after = factor * map.grad(N), factor * map.grad(after)
    ahead = (W - step * D) / (1 + step * weight_decay)
    residual = fenchel_young(map, ahead, N, weight_decay, factor).residual
    return ChangeBound(
        residual=-step * (1 + weight_decay * C) * residual,
        monotone=-C * ((M - after) * (D_after - D)).sum((-2, -1)),
        curvature=smoothness * step**2 / 2 * (D + weight_decay * ahead).square().sum((-2, -1)),
    )


def first_growth(
    violations: Sequence[float], values: Sequence[float], *, allowed: float | Sequence[float] = 0.0, rounding: float = 1e-9
) -> Growth | None:
    """Where V_B grows, or V_K does while V_B is 0, in a deterministic run; None if the pair is monotone.

    Args:
        violations: V_B after each step, in the order of the steps; `values`: V_K.
        allowed: by how much V_K may rise from each one to the next, a number or one for each step but the first: the
            curvature of `lyapunov_change_bound`.
        rounding: growth that counts as none, relative to 1 and to the largest number of each sequence.

    Raises ValueError for sequences of different lengths.

    Example:
        >>> from schatten.diagnostics.lyapunov import first_growth
        >>> first_growth([2.0, 0.5, 0.0, 0.0], [1.0, 9.0, 8.0, 7.0])
        >>> first_growth([2.0, 0.5, 0.0, 0.0], [1.0, 9.0, 8.0, 8.5])
        Growth(step=3, name='V_K', amount=0.5)
    """
    rises = [allowed] * (len(values) - 1) if isinstance(allowed, (int, float)) else list(allowed)
    if len(violations) != len(values) or len(rises) != max(0, len(values) - 1):
        raise ValueError(
            f"first_growth needs V_B and V_K of the same steps and what is allowed between each two, got {len(violations)}, "
            f"{len(values)} and {len(rises)}."
        )
    slack_B, slack_K = (rounding * max(1.0, *map(abs, series), 0.0) for series in (violations, values))
    for t in range(1, len(values)):
        if (grown := violations[t] - violations[t - 1]) > slack_B:
            return Growth(t, "V_B", grown)
        if violations[t - 1] <= slack_B and (grown := values[t] - values[t - 1]) > rises[t - 1] + slack_K:
            return Growth(t, "V_K", grown)
    return None


def betas_of(signal: Signal, group: Mapping[str, Any]) -> tuple[float, float] | None:
    """(beta1, beta2) of the paper's form that make a signal: S = beta1 M + (1 - beta1) G, M <- beta2 M + (1 - beta2) G.

    | signal | betas |
    |---|---|
    | `TwoBeta("paper")`, `TwoBeta("site")` with (b1, b2) | (b1, b2), (b1 b2, b2) |
    | `Momentum` with decay mu, with Nesterov and without | (mu^2, mu), (mu, mu) |
    | `Gradient` | (0, 0) |

    None for signals that are no such average. `Momentum(form="sum")` has M and S larger by 1 / (1 - mu).

    Example:
        >>> import schatten
        >>> from schatten.diagnostics.lyapunov import betas_of
        >>> betas_of(schatten.signals.Momentum(nesterov=True), {"momentum": 0.5})
        (0.25, 0.5)
    """
    match signal:
        case TwoBeta():
            first, second = group["betas"]
            return (first, second) if signal.form == "paper" else (first * second, second)
        case Momentum():
            mu = group["momentum"]
            return (mu * mu if signal.nesterov else mu, mu)
        case Gradient():
            return (0.0, 0.0)
    return None


@dataclass(frozen=True)
class Lyapunov:
    """Logs V_K of the model: the loss, and what V_K adds to it for each matrix.

    Matrices count whose rule has a `Map`, `DecoupledDecay` and a signal with betas (`betas_of`), beta1 <= beta2; without any
    nothing is logged. Parameters of other rules and of AdamW move the loss too, so V_K need not fall where they weigh much,
    nor with noise between batches or a changing lr. For a `Sum` of maps nothing is known without waiting for the device.

    Args:
        minimum: F*.
        solver: for the nuclear norm; None finds it by SVD.
    """

    minimum: float = 0.0
    solver: Solver | None = field(default=CHEAP)

    name: ClassVar[str] = "lyapunov"
    scope: ClassVar[Literal["matrix", "model"]] = "model"
    needs: ClassVar[frozenset[Need]] = frozenset({"momentum", "losses"})
    columns: ClassVar[Mapping[str, str]] = {
        "value": "V_K = F - F* + beyond, which falls in deterministic runs; in units of the loss",
        "loss": "F, the mean of the losses given to the monitor",
        "beyond": "the sum over matrices of (1/lambda) (cK)*(lambda W) + C [c K(M) + (cK)*(lambda W) + <lambda W, M>]",
    }
    cost: ClassVar[str] = "one loss for each batch; a polar factor of each momentum (nuclear norm), else two SVDs in fp64"

    def __call__(self, whole: Whole) -> Mapping[str, Tensor]:
        parts = []
        for block in whole.blocks:
            problem, betas = implied(block), betas_of(block.rule.signal, block.group)
            gain = settled(block.rule.signal, block.group)
            if problem is None or betas is None or gain is None or betas[0] > betas[1] or isinstance(problem.map, Sum):
                continue
            if block.group.get("maximize") or (block.momentum is None and betas[1] > 0):
                continue
            momentum = torch.zeros_like(block.weight) if block.momentum is None else block.momentum
            part = lyapunov(
                problem.map,
                block.weight,
                momentum,
                0.0,
                lr_of(block.group),
                problem.weight_decay,
                betas,
                problem.factor,
                decay=problem.form,
                solver=self.solver,
            )
            # The sum of gradients is gain M: the rule is that of K(gain S) / gain and the average M.
            parts.append(part.sum() / gain)
        if not parts or not whole.losses:
            return {}
        with torch.no_grad(), undisturbed(None, devices_of(whole.parameters.values())):
            loss = torch.stack([one().reshape(()).double() for one in whole.losses]).mean()
        beyond = torch.stack([part.to(loss.device) for part in parts]).sum()
        return {"value": loss - self.minimum + beyond, "loss": loss, "beyond": beyond}


QUANTITY = Lyapunov


def _implicit_lr(lr: float | Tensor, weight_decay: float, decay: Decay) -> float | Tensor:
    """The length of the implicit step that a step is."""
    if decay not in ("explicit", "implicit"):
        raise ValueError(f"decay must be 'explicit' or 'implicit', got {decay!r}.")
    if (not isinstance(lr, Tensor) and not lr >= 0) or not weight_decay >= 0:
        raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}.")
    if decay == "implicit":
        return lr
    # A tensor is not looked at: it may be on a device.
    if not isinstance(lr, Tensor) and not lr * weight_decay < 1:
        raise ValueError(f"Explicit decay needs lr * weight_decay < 1 for V_K, got {lr * weight_decay:g}.")
    return lr / (1 - lr * weight_decay)
