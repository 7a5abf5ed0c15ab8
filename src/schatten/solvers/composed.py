"""What the minimax polar solvers share: how long the composition is, and the checks of its options."""

from dataclasses import dataclass

import torch

from schatten.solvers import minimax
from schatten.solvers.core import check_steps, dtype_name

# Room above sigma = 1 in every fit: a bf16 cast after normalisation lifts sigma by up to 0.4 %, and each rounded
# product by about as much again. 1 % covers both; quintics fitted without room overflow (all-ones 96 x 130, bf16).
MARGIN = 1.01

# In fp16's Gram form: three times the room, with which two restarts keep it nearer to exact arithmetic than bf16's product
# form, where one percent leaves small matrices half outside the band or asks for a restart before every step (LOG.md).
ROOMY = 1.03

# The fit takes half of a tight tolerance; the other half is for rounding, 1e-5 in fp32 for sigma >= 1e-3.
ROUNDING_SHARE = 0.5

DEFAULT_TOL = 0.16
LOWER = 1e-3


@dataclass(frozen=True)
class Composition:
    """A tolerance or a number of steps, on [lower, 1], in a working precision."""

    tol: float | None
    fixed_steps: int | None
    lower: float
    dtype: str

    @property
    def steps(self) -> int:
        """How many quintics are applied."""
        if self.fixed_steps is not None:
            return self.fixed_steps
        assert self.tol is not None
        return minimax.steps_for(self.tol if self.tol > 0.01 else ROUNDING_SHARE * self.tol, self.lower, margin=MARGIN)

    @property
    def quintics(self) -> tuple[minimax.Quintic, ...]:
        """The best composition of that length."""
        return minimax.composition(self.lower, self.steps, margin=MARGIN)[0]

    def roomy(self, work: torch.dtype) -> tuple[minimax.Quintic, ...]:
        """What the Gram form is to apply in this precision: with more room for rounding where the tolerance allows it."""
        if work == torch.float16 and self.tol is not None:
            quintics, error = minimax.composition(self.lower, self.steps, margin=ROOMY)
            if error <= self.tol:
                return quintics
        return self.quintics

    @property
    def error(self) -> float:
        """What the composition leaves on [lower, 1] in exact arithmetic."""
        return minimax.composition(self.lower, self.steps, margin=MARGIN)[1]

    def __repr__(self) -> str:
        length = f"steps={self.fixed_steps}" if self.fixed_steps is not None else f"tol={self.tol}"
        return f"{type(self).__name__[1:].lower()}({length}, lower={self.lower}, dtype={self.dtype!r})"


def checked(
    tol: float | None, steps: int | None, lower: float, dtype: torch.dtype | str
) -> tuple[float | None, int | None, float, str]:
    """The fields of a `Composition`, or ValueError naming the option that is out of range."""
    if tol is not None and steps is not None:
        raise ValueError(f"tol and steps each fix the length of the iteration: give one, got tol={tol} and steps={steps}.")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must lie in (0, 1), got {tol}.")
    if tol is not None and tol < 1e-14:
        raise ValueError(f"tol must be reachable in double precision, at least 1e-14, got tol={tol}.")
    if steps is not None:
        check_steps(steps)
    if not 0 < lower < 1:
        raise ValueError(f"lower must lie in (0, 1), got {lower}.")
    if tol is None and steps is None:
        tol = DEFAULT_TOL
    if tol is not None:
        # An unreachable tolerance is refused here, not in the first step.
        minimax.steps_for(tol if tol > 0.01 else ROUNDING_SHARE * tol, lower, margin=MARGIN)
    return tol, steps, lower, dtype_name(dtype)
