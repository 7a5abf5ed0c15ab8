"""The momentum's spectrum in a few numbers: its norms, its nuclear ratio and its ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.effective_ranks import COLUMNS, measures


@dataclass(frozen=True)
class Momentum:
    """What `Gradient` logs of the gradient, of the momentum of each matrix; nothing for a rule that keeps none.

    The norms are those of the buffer as the rule keeps it: a sum is 1 / (1 - beta) times as long as an average.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.core import Block
        >>> from schatten.diagnostics.momentum import Momentum
        >>> W = torch.zeros(1, 4, 4)
        >>> found = Momentum(exact=True)(Block("w", schatten.Rule(), {}, W, momentum=torch.ones(1, 4, 4)))
        >>> round(float(found["effective_rank"]), 4)
        1.0
    """

    name: ClassVar[str] = "momentum"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"momentum"})
    columns: ClassVar[Mapping[str, str]] = COLUMNS
    cost: ClassVar[str] = "one msgn in fp32 (six quintics) and 16 power iterations; with exact one SVD without vectors"

    exact: bool = False

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        return {} if of.momentum is None else measures(of.momentum, exact=self.exact)


QUANTITY = Momentum
