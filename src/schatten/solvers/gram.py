"""The polar factor in the Gram form: all steps on m x m matrices, for rectangular ones."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from schatten.solvers.composed import LOWER, Composition, checked
from schatten.solvers.core import ALL, Columns, check_matrices, normalised, on_wide_batch, working_dtype
from schatten.solvers.iteration import Form, gram_form, product_form, restarts_for


@dataclass(frozen=True, repr=False)
class _Gram(Composition):
    def __call__(self, X: Tensor) -> Tensor:
        check_matrices(X, "X")
        return on_wide_batch(X, self.of_columns)

    def of_columns(self, X: Tensor, columns: Columns = ALL) -> Tensor:
        work = working_dtype(X, self.dtype)
        form, quintics = self.form(X.shape[-2], columns.count(X), work)
        return form(normalised(X, work, columns), quintics, columns=columns)

    def form(self, m: int, n: int, work: torch.dtype, half: bool = False) -> Form:
        if m == n:
            return product_form, self.quintics
        quintics = self.roomy(work)
        return partial(gram_form, restarts=restarts_for(quintics, work, False)), quintics


def gram(
    *, tol: float | None = None, steps: int | None = None, lower: float = LOWER, dtype: torch.dtype | str = "auto"
) -> _Gram:
    """The composition of `polynomial` on X X^T (m x m), multiplied with X at the end; square matrices take the product form.

    For n = 4 m it takes two thirds of the multiplications. Rounding of X X^T grows by the square of the iteration's gain:
    without restarts, half precision diverges on ill-conditioned matrices. X X^T is formed anew where a simulation of that
    rounding asks for it (`schatten.solvers.iteration.restarts_for`). fp32 and fp64 keep the bands of `polynomial`; bf16 and
    fp16 widen them by up to 0.03 and 0.003 for singular values above 1e-2 of the norm.

    Options and errors as `polynomial`, which chooses this form by itself where it is cheaper.

    Example:
        >>> import torch, schatten
        >>> X = torch.randn(4, 16)
        >>> O = schatten.solvers.gram(tol=1e-3, dtype="float32")(X)
        >>> bool((O @ O.mT - torch.eye(4)).abs().max() < 2e-3)
        True
    """
    return _Gram(*checked(tol, steps, lower, dtype))
