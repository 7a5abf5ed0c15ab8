"""The trust region's step: the linear model plus a composite term, minimised over a ball around the weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.maps import L1, Frobenius, KyFan, Map, Nuclear, Ordered, Scaled, Schatten
from schatten.maps.combinations import prox_of
from schatten.retractions.core import State, Stateless

NORMS = (Frobenius, KyFan, L1, Nuclear, Ordered, Schatten)


@dataclass(frozen=True)
class CompositeStep(Stateless):
    """W <- argmin of <D, X> + (lambda/2) ||X||_F^2 + R(X) over ||X - W|| <= lr c (Kovalev, arXiv 2503.12645, eq. for a step).

    The ball is that of the norm dual to `norm`: spectral for `Nuclear`, entries for `L1`, Frobenius for `Frobenius`. lambda
    is the group's weight_decay, here part of F and not decoupled, and R = `penalty`, any multiple of a norm: `0.01 * Nuclear()`
    or `0.01 * L1()`. Without a penalty the answer is exact,

        X = W + P(-D / lambda - W),   or   X = W - lr c grad norm(D)   for lambda = 0  (the rule whose map is `norm`),

    P the projection onto the ball. With one it is the last of `iterations` Douglas-Rachford steps on the two proximal maps:
    always inside the ball, at 50 within 1 % of the attainable decrease of the objective on Gaussian problems
    (`tests/reference/test_trust_region_twin.py`). All of it is fp64, by singular value decompositions.

    Raises TypeError for a norm or penalty that is no (multiple of a) norm of `schatten.maps`.

    Example:
        >>> import torch, schatten
        >>> from schatten.maps import L1
        >>> step = schatten.retractions.CompositeStep(L1(), penalty=0.5 * L1())
        >>> W, D = torch.tensor([[0.1, 2.0]]), torch.tensor([[0.2, 1.0]])
        >>> W, _ = step(W, D, length=0.5, state={}, group={"weight_decay": 0.0})
        >>> [round(w, 3) for w in W.flatten().tolist()]
        [0.0, 1.5]
    """

    norm: Map = field(default_factory=Nuclear)
    penalty: Map | None = None
    iterations: int = 50

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.norm, NORMS):
            raise TypeError(f"norm must be a norm of schatten.maps, such as Nuclear(), got {self.norm!r}.")
        inner = self.penalty.map if isinstance(self.penalty, Scaled) else self.penalty
        if inner is not None and not isinstance(inner, NORMS):
            raise TypeError(
                f"penalty must be a multiple of a norm of schatten.maps, such as 0.01 * L1(), got {self.penalty!r}."
            )
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations must be a whole number >= 1, got {self.iterations!r}.")

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        decay = group["weight_decay"]
        if self.penalty is None and decay == 0:
            return W - self.norm.grad(D) * length, {}
        X, M = W.double(), D.double()
        radius = torch.as_tensor(length, dtype=X.dtype, device=X.device)
        # lr = 0 leaves the weight, and must not be divided by.
        some = radius > 0
        radius = torch.where(some, radius, 1.0)
        step = self._project(-M / decay - X, radius) if self.penalty is None else self._split(X, M, radius, decay)
        return torch.where(some, W + step.to(W.dtype), W), {}

    def _project(self, Z: Tensor, radius: Tensor) -> Tensor:
        """The nearest point of the ball, by Moreau from the norm's proximal map."""
        Y = Z / radius
        return radius * (Y - prox_of(self.norm)(Y, 1.0))

    def _split(self, W: Tensor, M: Tensor, radius: Tensor, decay: float) -> Tensor:
        assert self.penalty is not None
        prox = prox_of(self.penalty)
        size = torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True)
        # So that a step of the iteration carries a typical direction from one side of the ball to the other.
        tau = radius * torch.where(size > 0, min(M.shape[-2:]) ** 0.5 / size, 1.0)
        merged = 1 / (decay + 1 / tau)
        Z, Y = torch.zeros_like(W), torch.zeros_like(W)
        for _ in range(self.iterations):
            Y = self._project(Z, radius)
            V = merged * ((W + 2 * Y - Z) / tau - M)
            # A norm's proximal map commutes with positive factors, so that of `merged` times it is this.
            Z = Z + (merged * prox(V / merged, 1.0) - W) - Y
        return self._project(Z, radius)
