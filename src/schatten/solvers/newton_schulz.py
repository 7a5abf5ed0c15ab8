"""Keller Jordan's Newton-Schulz iteration: one quintic, repeated. What torch.optim.Muon runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten.solvers.core import (
    Quintic,
    check_matrices,
    check_steps,
    dtype_name,
    normalised,
    on_wide_batch,
    quintic_steps,
    working_dtype,
)

# Source: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024. Chosen for a steep slope at zero,
# not for convergence: q(1) = 0.701, and for sigma in [1e-2, 1] five steps end in [0.68, 1.13].
KELLER: Quintic = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class _NewtonSchulz:
    steps: int
    dtype: str

    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        work = working_dtype(X, self.dtype)
        return on_wide_batch(X, lambda Y: quintic_steps(normalised(Y, work), [KELLER] * self.steps))

    def __repr__(self) -> str:
        return f"newton_schulz(steps={self.steps}, dtype={self.dtype!r})"


def newton_schulz(*, steps: int = 5, dtype: torch.dtype | str = "auto") -> _NewtonSchulz:
    """Keller's quintic (3.4445, -4.7750, 2.0315), `steps` times, on X / ||X||_F: the schedule of `torch.optim.Muon`.

    Singular values above 1e-2 of the Frobenius norm end in [0.68, 1.13]; more steps lift smaller ones into that band
    but never narrow it. `dtype` is the precision of the products, `"auto"` the fastest of the device.

    Raises ValueError for fewer than one step or an unknown dtype.

    Example:
        >>> import torch, schatten
        >>> O = schatten.solvers.newton_schulz()(torch.eye(4))
        >>> bool((O.diagonal() > 0.6).all())
        True
    """
    check_steps(steps)
    return _NewtonSchulz(steps, dtype_name(dtype))
