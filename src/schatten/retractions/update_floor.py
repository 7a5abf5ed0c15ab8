"""A floor on the relative size of an update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from schatten.maps.lifts import safe_norm
from schatten.retractions.core import State, Stateless, lr_of

DIMS = {"matrix": (-2, -1), "rows": (-1,)}


@dataclass(frozen=True)
class UpdateFloor(Stateless):
    """W <- W - lr c D max(1, ratio ||W|| / ||c D||): an update is at least lr `ratio` times as long as its weight.

    Norms are of whole matrices ("u/w floor" of the modded-nanogpt benchmark, ratio 0.35 and later 0.3825) or of each row
    (`over="rows"`, its RowFloor). It takes the place of weight decay, which is not used. A zero direction stays zero.

    Raises ValueError for a ratio outside (0, inf) or another `over`.

    Example:
        >>> import torch, schatten
        >>> retract = schatten.retractions.UpdateFloor(ratio=0.5)
        >>> W, D = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> retract(W, D, length=0.1, state={}, group={"lr": 0.1})[0]
        tensor([[2.7500, 4.0000]])
    """

    ratio: float = 0.35
    over: str = "matrix"

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < float("inf"):
            raise ValueError(f"ratio must lie in (0, inf), got {self.ratio!r}.")
        if self.over not in DIMS:
            raise ValueError(f"over must be one of {', '.join(map(repr, DIMS))}, got {self.over!r}.")

    def __call__(
        self, W: Tensor, D: Tensor, length: float | Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        dim = DIMS[self.over]
        update = D * length
        size = safe_norm(update, dim)
        least = lr_of(group) * self.ratio * safe_norm(W, dim)
        # Divided by its size before it is made as long as the floor: the quotient of both may overflow.
        raised = torch.where(size > 0, update / size, 0.0) * least
        return W - torch.where(size >= least, update, raised), {}
