"""Ordered (sorting) norms: a weight for each place in the ranking."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schatten.maps.lifts import each
from schatten.maps.potential import Potential, Threshold, number
from schatten.solvers import FunctionSolver, krylov


@dataclass(frozen=True)
class Ordered(Potential):
    """K(S) = sum of weights_i s_(i) over the ranked singular values; grad K = sum of weights_i u_i v_i^T.

    `weights` are positive, not increasing, and 0 beyond their end: (1, 1) is `KyFan(2)`, (1,) the spectral norm.
    K*(X) = 0 if for each k the k largest singular values of X add up to at most weights_1 + ... + weights_k, infinity
    otherwise. Decoupled decay lambda makes a rule solve min F(W) subject to that set over lambda.

    The default solver is the block Krylov space, `krylov()`, as for `KyFan`; `svd()` is exact.

    Raises ValueError for weights that are empty, not positive or increasing.

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Ordered((1.0, 0.5), solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([1.0, 3.0]))).diagonal().tolist()
        [0.5, 1.0]
    """

    weights: tuple[float, ...] = (1.0,)
    solver: FunctionSolver = field(default_factory=krylov, kw_only=True)

    def __post_init__(self) -> None:
        weights = tuple(float(w) for w in self.weights)
        falling = all(w >= v for w, v in itertools.pairwise(weights))
        if not weights or not falling or not 0 < weights[-1] <= weights[0] < float("inf"):
            raise ValueError(f"Ordered needs positive weights that do not increase, got weights={self.weights!r}.")
        object.__setattr__(self, "weights", weights)
        super().__post_init__()

    @property
    def rank(self) -> int:
        return len(self.weights)

    def _padded(self, s: Tensor) -> Tensor:
        c = s.new_tensor(self.weights)[: s.shape[-1]]
        return torch.cat([c, c.new_zeros(s.shape[-1] - len(c))])

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return (s.sort(dim=-1, descending=True).values * self._padded(s)).sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        places = s.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(s).scatter(-1, places, self._padded(s).expand_as(s)) * (s > 0)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.new_zeros(u.shape[:-1])

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        bounds = self._padded(u).cumsum(-1)
        return (u.sort(dim=-1, descending=True).values.cumsum(-1) / bounds - 1).amax(-1)

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        # Isotonic regression of the ranked magnitudes less tau c: min over j <= i of max over k >= i of mean(z[j..k]).
        ranked, places = s.sort(dim=-1, descending=True)
        sums = torch.nn.functional.pad((ranked - tau * self._padded(s)).cumsum(-1), (1, 0))
        index = torch.arange(s.shape[-1], device=s.device)
        length = index[None, :] - index[:, None] + 1
        means = (sums[..., None, 1:] - sums[..., :-1, None]) / length.clamp(min=1)
        means = torch.where(length >= 1, means, -torch.inf)
        best = means.flip(-1).cummax(-1).values.flip(-1)
        fitted = torch.where(length >= 1, best, torch.inf).amin(-2)
        return torch.zeros_like(s).scatter(-1, places, fitted.clamp(min=0))

    def problem(self, decay: float) -> str:
        sums = [number(sum(self.weights[: i + 1]) / decay) for i in range(min(len(self.weights), 4))]
        more = ", ..." if len(self.weights) > 4 else ""
        return f" subject to sums of the 1, 2, ... largest {each(self.over)} <= {', '.join(sums)}{more}"
