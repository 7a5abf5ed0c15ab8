"""The polar factor by a minimax composition of odd quintics, as long as a tolerance asks for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.solvers import minimax
from schatten.solvers.core import (
    check_matrices,
    check_steps,
    dtype_name,
    normalised,
    on_wide_batch,
    quintic_steps,
    working_dtype,
)

# Room above sigma = 1 in every fit: a bf16 cast after normalisation lifts sigma by up to 0.4 %, and each rounded
# product by about as much again. 1 % covers both; quintics fitted without room overflow (all-ones 96 x 130, bf16).
MARGIN = 1.01

# The fit takes half of a tight tolerance; the other half is for rounding, 1e-5 in fp32 for sigma >= 1e-3.
ROUNDING_SHARE = 0.5

DEFAULT_TOL = 0.16
LOWER = 1e-3


@dataclass(frozen=True)
class _Polynomial:
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

    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        work = working_dtype(X, self.dtype)
        quintics, _ = minimax.composition(self.lower, self.steps, margin=MARGIN)
        return on_wide_batch(X, lambda Y: quintic_steps(normalised(Y, work), quintics))

    def __repr__(self) -> str:
        length = f"steps={self.fixed_steps}" if self.fixed_steps is not None else f"tol={self.tol}"
        return f"polynomial({length}, lower={self.lower}, dtype={self.dtype!r})"


def polynomial(
    *, tol: float | None = None, steps: int | None = None, lower: float = LOWER, dtype: torch.dtype | str = "auto"
) -> _Polynomial:
    """U V^T by the best composition of odd quintics (Polar Express, Amsel et al. 2025, fitted here for each tolerance).

    Every singular value of at least `lower` times the Frobenius norm ends in [1 - tol, 1 + tol]; smaller ones end
    between 0 and 1 + tol, and zero stays zero. Give `tol` (default 0.16: five steps) or `steps`, not both. `dtype` is
    the precision of the products, `"auto"` the fastest of the device. fp32 keeps the band down to tol = 1e-3, fp64 down
    to 1e-10. bf16 and fp16 widen it by at most 0.005 and 0.001 for singular values above 1e-2 of the norm, and by 0.08
    and 0.002 above 1e-3; below, their rounding may exceed what is left of a direction, sign included. fp32 products
    obey `torch.set_float32_matmul_precision`: below "highest" they may be TF32's or bf16's.

    Raises ValueError for a tolerance outside (0, 1), fewer than one step, a lower end outside (0, 1) or both `tol`
    and `steps`.

    Example:
        >>> import torch, schatten
        >>> schatten.solvers.polynomial(tol=1e-3, dtype="float32")
        polynomial(tol=0.001, lower=0.001, dtype='float32')
    """
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
    solver = _Polynomial(tol, steps, lower, dtype_name(dtype))
    _ = solver.steps  # an unreachable tolerance is refused here, not in the first step
    return solver
