"""The polar factor by a minimax composition of odd quintics, as long as a tolerance asks for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers.composed import LOWER, Composition, checked
from schatten.solvers.core import ALL, Columns, check_matrices, normalised, on_wide_batch, working_dtype
from schatten.solvers.iteration import Form, cheaper_form, product_form

LOOSE = 0.05


@dataclass(frozen=True, repr=False)
class _Polynomial(Composition):
    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        return on_wide_batch(X, self.of_columns)

    def of_columns(self, X: Tensor, columns: Columns = ALL) -> Tensor:
        work = working_dtype(X, self.dtype)
        form, quintics = self.form(X.shape[-2], columns.count(X), work, kernels.halves(X, work))
        return form(normalised(X, work, columns), quintics, columns=columns)

    def form(self, m: int, n: int, work: torch.dtype, half: bool = False) -> Form:
        # Rounding the entries of the small matrices costs half precision 0.02 of the band, which a tight one does not have.
        if self.error <= LOOSE and work not in (torch.float32, torch.float64):
            return product_form, self.quintics
        roomy = self.roomy(work)
        form = cheaper_form(m, n, roomy, work, half=half)
        return (product_form, self.quintics) if form is product_form else (form, roomy)


def polynomial(
    *, tol: float | None = None, steps: int | None = None, lower: float = LOWER, dtype: torch.dtype | str = "auto"
) -> _Polynomial:
    """U V^T by the best composition of odd quintics (Polar Express, Amsel et al. 2025, fitted here for each tolerance).

    Every singular value of at least `lower` times the Frobenius norm ends in [1 - tol, 1 + tol]; smaller ones end
    between 0 and 1 + tol, and zero stays zero. Give `tol` (default 0.16: five steps) or `steps`, not both. `dtype` is
    the precision of the products, `"auto"` the fastest of the device. fp32 keeps the band down to tol = 1e-3, fp64 down
    to 1e-10. bf16 and fp16 widen it by at most 0.015 and 0.003 for singular values above 1e-2 of the norm, and by 0.08
    and 0.005 above 1e-3, in matrices of 24 rows or more; of a few rows, whose rounding errors do not average out, by 0.02
    and 0.006 above 1e-2, and near 1e-3 fp16 loses a tenth of a direction and bf16 all of it. Below, rounding may exceed
    what is left of a direction, sign included. fp32 products obey `torch.set_float32_matmul_precision`: below "highest"
    they may be TF32's or bf16's.

    Rectangular matrices are iterated in the Gram form (`gram`) where that takes fewer multiplications, restarts included.
    bf16 asks for so many that it takes the product form, as half precision does for a band below 0.05; fp16 takes the Gram
    form with two, its quintics fitted with more room for rounding (a band of 0.155 instead of 0.135 by default).

    Raises ValueError for a tolerance outside (0, 1), fewer than one step, a lower end outside (0, 1) or both `tol`
    and `steps`.

    Example:
        >>> import torch, schatten
        >>> schatten.solvers.polynomial(tol=1e-3, dtype="float32")
        polynomial(tol=0.001, lower=0.001, dtype='float32')
    """
    return _Polynomial(*checked(tol, steps, lower, dtype))
