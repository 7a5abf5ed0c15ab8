"""Newton-Schulz iterations with published schedules of quintics; by default Keller Jordan's, as torch.optim.Muon runs it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.solvers.core import (
    ALL,
    Columns,
    check_matrices,
    check_steps,
    dtype_name,
    normalised,
    on_wide_batch,
    working_dtype,
)
from schatten.solvers.fit import scalar_iterates
from schatten.solvers.iteration import Form, Quintic, product_form
from schatten.solvers.schedules import SCHEDULES

# A matrix that was normalised and rounded to bf16 has singular values up to 1.0023 (all-ones 96 x 130), here with room.
LARGEST = 1.004
HIGHEST = 1.6


@dataclass(frozen=True)
class _NewtonSchulz:
    schedule: str | tuple[Quintic, ...]
    steps: int
    dtype: str

    @property
    def quintics(self) -> tuple[Quintic, ...]:
        """The quintics in the order they are applied."""
        if isinstance(self.schedule, tuple):
            return self.schedule
        return SCHEDULES[self.schedule].steps(self.steps)

    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        return on_wide_batch(X, self.of_columns)

    def of_columns(self, X: Tensor, columns: Columns = ALL) -> Tensor:
        return product_form(normalised(X, working_dtype(X, self.dtype), columns), self.quintics, columns=columns)

    def form(self, m: int, n: int, work: torch.dtype, half: bool = False) -> Form:
        return product_form, self.quintics

    def __repr__(self) -> str:
        steps = "" if isinstance(self.schedule, tuple) else f", steps={self.steps}"
        return f"newton_schulz({self.schedule!r}{steps}, dtype={self.dtype!r})"


def newton_schulz(
    schedule: str | Sequence[Quintic] = "keller", *, steps: int | None = None, dtype: torch.dtype | str = "auto"
) -> _NewtonSchulz:
    """X <- a X + b (X X^T) X + c (X X^T)^2 X on X / ||X||_F, once for each quintic (a, b, c) of a published schedule.

    | `schedule` | quintics | band of singular values above a part of the norm | source |
    |---|---|---|---|
    | `"keller"` | (3.4445, -4.7750, 2.0315), five times | [0.68, 1.13] above 1e-2 | Jordan, 2024; `torch.optim.Muon` |
    | `"polar-express"` | eight | [0.999, 1.001] above 1e-3; five steps [0.84, 1.13] | Amsel et al., 2505.16932 |
    | `"cans"` | five | [0.85, 1.13] above 1e-3 | Grishina et al., 2506.10935 |

    Polar Express and CANS carry the safety factor 1.01, without which they overflow in half precision. `steps` takes
    fewer of them; Keller's may be repeated, which lifts smaller singular values into its band but never narrows it.
    `schedule` may be your own quintics. `dtype` is the precision of the products.

    Raises ValueError for an unknown name, for more steps than the schedule has, and for quintics that send a singular
    value in (0, 1.004] to zero or below, where a step would ascend, or above 1.6.

    Example:
        >>> import torch, schatten
        >>> O = schatten.solvers.newton_schulz()(torch.eye(4))
        >>> bool((O.diagonal() > 0.6).all())
        True
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))} or quintics, got {schedule!r}.")
        if steps is not None:
            check_steps(steps)
        quintics = SCHEDULES[schedule].steps(steps)
        return _NewtonSchulz(schedule, len(quintics), dtype_name(dtype))
    if steps is not None:
        raise ValueError(f"steps shortens a named schedule; of your own quintics pass as many as you want, got steps={steps}.")
    own = tuple((float(a), float(b), float(c)) for a, b, c in schedule)
    _check_range(own)
    return _NewtonSchulz(own, len(own), dtype_name(dtype))


def _check_range(quintics: tuple[Quintic, ...]) -> None:
    if not quintics:
        raise ValueError("schedule must hold at least one quintic (a, b, c), got none.")
    x = torch.cat([torch.logspace(-6, -2, 400), torch.linspace(0.01, LARGEST, 4000)]).double()
    y = scalar_iterates(quintics, x)[-1].nan_to_num(torch.inf)
    for bad, what in ((y <= 0, "turns its sign, so that a step ascends"), (y > HIGHEST, f"exceeds {HIGHEST}, which overflows")):
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(
                f"schedule sends the singular value {float(x[at]):.4g} to {float(y[at]):.4g}: it {what}. Quintics must map "
                f"(0, {LARGEST}] into (0, {HIGHEST}]; a safety factor s > 1, (a/s, b/s^3, c/s^5), gives room at the upper end."
            )
