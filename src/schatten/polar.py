"""`polar`: the polar factor as a function."""

import torch
from torch import Tensor

from schatten.solvers import polynomial


def polar(G: Tensor, *, tol: float | None = None, steps: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """U V^T of G = U S V^T (msign), shape (*b, m, n) -> (*b, m, n), in G's dtype; G is not written to.

    A singular value of at least 1e-3 times the Frobenius norm ends in [1 - tol, 1 + tol] (default tol 0.16), a smaller
    one between 0 and 1 + tol, zero at zero. The result does not depend on G's scale. A non-finite matrix gives
    non-finite values and leaves the others of its batch alone.

    Args:
        tol: half-width of the band; held down to 1e-3 in fp32 and 1e-10 in fp64. `steps` fixes the number of quintics instead.
        dtype: precision of the products; default fp64 for fp64 input and fp32 for everything else. Pass
            `torch.bfloat16` for speed where its rounding does not matter (`schatten.solvers.polynomial` has the numbers).
            fp32 products obey `torch.set_float32_matmul_precision`; with less than "highest" ask for fp64 where it counts.

    Raises TypeError for complex or integer input, ValueError for fewer than two dimensions, both `tol` and `steps`, or
    either out of range.

    Example:
        >>> import torch, schatten
        >>> O = schatten.polar(torch.randn(3, 8, 5), tol=1e-3)
        >>> bool((O.mT @ O - torch.eye(5)).abs().max() < 2e-3)
        True
    """
    if dtype is None:
        dtype = torch.float64 if isinstance(G, Tensor) and G.dtype == torch.float64 else torch.float32
    return polynomial(tol=tol, steps=steps, dtype=dtype)(G)
