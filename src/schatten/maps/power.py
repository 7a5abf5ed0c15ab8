"""Powers: the spectral powers of momentum and Adam's ratio."""

from dataclasses import dataclass

from torch import Tensor

from schatten.maps.lifts import each
from schatten.maps.potential import Potential, Threshold, number


@dataclass(frozen=True)
class Power(Potential):
    """K(S) = sum of s^(1+p) / (1+p), 0 < p <= 1; grad K = U s^p V^T (Psi_p of Qi et al., arXiv 2602.04669).

    K*(X) = sum of u^q / q with q = 1 + 1/p. Decoupled decay lambda makes a rule solve
    min F(W) + lambda^(1/p)/q * sum of sigma^q: p = 1 is the squared Frobenius norm (momentum SGD), p = 1/2 is
    (lambda^2 / 3) sum sigma^3, and p -> 0 the spectral ball of `Nuclear`.

    Raises ValueError for p outside (0, 1].

    Example:
        >>> import torch, schatten
        >>> K = schatten.maps.Power(0.5, solver=schatten.solvers.svd())
        >>> K.grad(torch.diag(torch.tensor([4.0, 9.0]))).diagonal().tolist()
        [2.0, 3.0]
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 < self.p <= 1:
            raise ValueError(f"Power needs 0 < p <= 1, got p={self.p!r}; for p = 0 use Nuclear().")
        object.__setattr__(self, "p", float(self.p))
        super().__post_init__()

    @property
    def degree(self) -> float:
        return self.p

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return s.pow(1 + self.p).sum(-1) / (1 + self.p)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return s.pow(self.p)

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        q = 1 + 1 / self.p
        return u.pow(q).sum(-1) / q

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return -u.new_ones(u.shape[:-1])

    def problem(self, decay: float) -> str:
        q = 1 + 1 / self.p
        return f" + {number(decay ** (q - 1) / q)} * sum of {each(self.over)}^{q:.4g}"
