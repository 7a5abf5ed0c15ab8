"""The gradient's spectrum in a few numbers: its norms, its nuclear ratio and its ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.effective_ranks import COLUMNS, effective_rank, measures, nuclear_ratio, stable_rank

__all__ = ["Gradient", "effective_rank", "nuclear_ratio", "stable_rank"]


@dataclass(frozen=True)
class Gradient:
    """`nuclear_ratio`, `stable_rank` and norms of the gradient of each matrix; with `exact` the effective rank too.

    Without `exact` the nuclear norm comes from one msgn, with the error that `nuclear_norm` states (0.2 % for dense gradients,
    so 0.4 % of the ratio), and the spectral norm from 16 power iterations, from below (2 % for a Gaussian 512 x 512, so the
    stable rank is 4 % too large). With `exact` everything comes from one SVD in fp64, which makes the host wait on a GPU.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.core import Block
        >>> from schatten.diagnostics.gradient import Gradient
        >>> W = torch.zeros(1, 4, 4)
        >>> found = Gradient(exact=True)(Block("w", schatten.Rule(), {}, W, gradient=torch.eye(4)[None]))
        >>> {name: round(float(value), 4) for name, value in found.items()}
        {'frobenius': 2.0, 'nuclear': 4.0, 'nuclear_ratio': 4.0, 'stable_rank': 4.0, 'effective_rank': 4.0}
    """

    name: ClassVar[str] = "gradient"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient"})
    columns: ClassVar[Mapping[str, str]] = COLUMNS
    cost: ClassVar[str] = "one msgn in fp32 (six quintics) and 16 power iterations; with exact one SVD without vectors"

    exact: bool = False

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.gradient is not None
        return measures(of.gradient, exact=self.exact)


QUANTITY = Gradient
