"""Scion: one norm ball per kind of layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from schatten.maps import L1, Nuclear
from schatten.optimizer import SpectralOptimizer
from schatten.retractions import DecoupledDecay
from schatten.routing import plan
from schatten.rule import Rule
from schatten.scales import Scale
from schatten.signals import Momentum
from schatten.signals.core import check_switch
from schatten.solvers import Solver, polynomial

BALLS = ("spectral", "sign")


@dataclass(frozen=True)
class PerInput:
    """c = 1 / fan_in: signs of size c map inputs of RMS at most 1 to outputs of at most 1, whatever the width."""

    def factor(self, fan_out: int, fan_in: int) -> float:
        return 1 / fan_in

    def __call__(self, D: Tensor) -> float:
        return self.factor(*D.shape[-2:])


class Scion(SpectralOptimizer):
    r"""Scion (arXiv 2502.07529): W <- (1 - lr) W + lr rho lmo(M), weights stay in a ball of radius rho of their layer's norm.

        M <- beta M + (1 - beta) G,
        lmo(M) = -sqrt(fan_out / fan_in) U V^T  (spectral ball)   or   -sign(M) / fan_in  (sign ball)

    It is Muon without Nesterov, scale "mup", learning rate lr rho and decay 1 / rho: min F subject to
    ||W||_op <= rho sqrt(fan_out / fan_in), and |w| <= rho / fan_in for every entry under the sign ball. Learning rates
    transfer across width. Given a module, hidden matrices get the spectral ball, embeddings and output heads the sign ball,
    and vectors AdamW with the same lr; a group's `ball` and `radius` say otherwise. `constrained=False` is the unconstrained
    variant, W <- W + lr rho lmo(M).

    Differences from the released code: its `momentum` is 1 - beta; vectors are trained by AdamW instead of a ball of their
    RMS, and the input's column norm is not the default (nanoGPT's sign ball for the tied table is). Start on the ball with
    `schatten.init_spectral_(model)`, which gives radius 1.

    Args:
        params: a module, or matrices and tables.
        lr: gamma in (0, 1], the share of the way to the ball's boundary taken in one step.
        momentum: beta of the average.
        radius: rho of spectral balls, 50 for nanoGPT.
        sign_radius: rho of sign balls, 3000 for nanoGPT.
        constrained: keep weights in their balls.
        solver: of U V^T, see `Muon`.
        options: of `SpectralOptimizer`.

    State: one tensor per matrix.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(2, 2))
        >>> opt = schatten.Scion([W], lr=0.1, radius=5.0, solver=schatten.solvers.svd())
        >>> W.grad = torch.diag(torch.tensor([3.0, 4.0]))
        >>> opt.step()
        >>> [round(w, 4) for w in W.diagonal().tolist()]
        [-0.5, -0.5]
    """

    group_options = ("ball",)

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 2**-12,
        momentum: float = 0.9,
        *,
        radius: float = 50.0,
        sign_radius: float = 3000.0,
        constrained: bool = True,
        solver: Solver | None = None,
        rules: Iterable[tuple[Any, ...]] = (),
        **options: Any,
    ) -> None:
        if "weight_decay" in options:
            raise ValueError("weight_decay is part of Scion's balls: leave it out, and set radius or constrained=False.")
        check_switch("constrained", constrained)
        _check_radius("sign_radius", sign_radius)
        self._nuclear = Nuclear(polynomial() if solver is None else solver)
        rules = list(rules)
        if isinstance(params, nn.Module):
            found = plan(params, rules, strict=options.get("strict", True))
            tables = [e.name for e in found if e.reason.startswith(("embedding", "shares storage", "output head"))]
            sign = {"ball": "sign", "radius": sign_radius}
            rules += [(name, "spectral", sign) for name in tables]
            options["adamw"] = {"weight_decay": 0.0, **(options.get("adamw") or {})}
        weight_decay = 1.0 if constrained else 0.0
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, momentum=momentum, ball="spectral", radius=radius, rules=rules, **options
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_nuclear": self._nuclear}

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The ball of a group, with its radius as a factor of the map: decay 1 then keeps weights inside."""
        radius = group["radius"]
        _check_radius("radius", radius)
        if group["ball"] not in BALLS:
            raise ValueError(f"ball must be one of {', '.join(map(repr, BALLS))}, got {group['ball']!r}.")
        spectral = group["ball"] == "spectral"
        K = radius * (self._nuclear if spectral else L1())
        return Rule(Momentum(nesterov=False), K, Scale("mup") if spectral else PerInput(), DecoupledDecay())


def _check_radius(name: str, radius: Any) -> None:
    if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not 0 < radius < float("inf"):
        raise ValueError(f"{name} must be a number in (0, inf), got {radius!r}.")
