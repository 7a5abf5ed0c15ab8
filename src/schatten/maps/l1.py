"""Sums of entries or of row or column norms: the element-wise and row-wise relatives of the nuclear norm."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from schatten.maps.lifts import check_lift, norm_name
from schatten.maps.potential import Potential, Threshold, largest, number


@dataclass(frozen=True)
class L1(Potential):
    """K(S) = sum of the magnitudes: |S_ij| (Lion, Signum) or, by `over`, row or column norms; grad K = their directions.

    | `over` | K | grad K | constraint under decay lambda |
    |---|---|---|---|
    | `"entries"` | sum of absolute entries | sign(S) | largest absolute entry <= 1/lambda |
    | `"rows"`, `"columns"` | sum of row (column) norms | rows (columns) of unit norm | largest row (column) norm <= 1/lambda |

    K*(X) = 0 if the largest magnitude of X is at most 1, infinity otherwise. Over the spectrum this is `Nuclear`, over
    the whole matrix `Frobenius`.

    Example:
        >>> import torch, schatten
        >>> schatten.maps.L1().grad(torch.tensor([[3.0, -4.0]]))
        tensor([[ 1., -1.]])
        >>> schatten.maps.L1(over="rows").grad(torch.tensor([[3.0, -4.0]]))
        tensor([[ 0.6000, -0.8000]])
    """

    over: str = field(default="entries", kw_only=True)

    def __post_init__(self) -> None:
        check_lift(self.over, ("entries", "rows", "columns"))
        super().__post_init__()

    def k(self, s: Tensor, a: Threshold) -> Tensor:
        return s.sum(-1)

    def h(self, s: Tensor, a: Threshold) -> Tensor:
        return torch.where(s.isnan(), s, (s > 0).to(s.dtype))

    def k_star(self, u: Tensor, a: Threshold) -> Tensor:
        return u.new_zeros(u.shape[:-1])

    def excess(self, u: Tensor, a: Threshold) -> Tensor:
        return largest(u) - 1

    def shrunk(self, s: Tensor, tau: float, a: Threshold) -> Tensor:
        return (s - tau).clamp(min=0)

    def problem(self, decay: float) -> str:
        return f" subject to {norm_name(self.over, math.inf)} <= {number(1 / decay)}"
