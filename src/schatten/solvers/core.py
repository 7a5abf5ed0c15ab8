"""What the solvers share: the protocols, the safe normalisation and the working precision.

Norms neither overflow for a large matrix nor vanish for a small one, so the result does not depend on the input's scale. A
zero matrix stays zero; a non-finite matrix comes out non-finite and spreads to no other matrix of its batch.

A polynomial of X sees the columns of X through X X^T and the norm alone. Iterations ask `Columns` for both, and so run
unchanged where a process holds some of the columns (`schatten.placements.gram`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from schatten import kernels

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@runtime_checkable
class Solver(Protocol):
    """A pure function from a batch of matrices to the batch of their polar factors."""

    def __call__(self, X: Tensor) -> Tensor: ...


class SpectralFunction(Protocol):
    """What a function solver needs to know of U h(Sigma) V^T; hashable, and h(0) = 0 is understood.

    `h(s, a)` for singular values (*b, r) and a threshold `a`, a number or (*b, 1); it is homogeneous in both together,
    h(c s, c a) = c^degree h(s, a). `a` is the threshold's value, 0 without one, `relative` the norm of X it is to be
    multiplied by, if any, and `threshold(X)` the product. `rank` is how many leading singular values count, None for all.
    `family` is the same function at a = 1, and None without a threshold.
    """

    @property
    def degree(self) -> float: ...

    @property
    def rank(self) -> int | None: ...

    @property
    def a(self) -> float: ...

    @property
    def relative(self) -> str | None: ...

    @property
    def vanishes(self) -> bool: ...

    @property
    def family(self) -> "SpectralFunction | None": ...

    def h(self, s: Tensor, a: Tensor | float) -> Tensor: ...

    def threshold(self, S: Tensor) -> Tensor | float: ...


@runtime_checkable
class FunctionSolver(Protocol):
    """A solver of spectral functions: `apply(X, f)` is U h(Sigma) V^T, and `check(f)` refuses an f it cannot do."""

    def apply(self, X: Tensor, f: SpectralFunction) -> Tensor: ...

    def check(self, f: SpectralFunction) -> None: ...


class Columns(Protocol):
    """What an iteration asks of all columns of a matrix, of which X (b, m, n) may be those that this process holds."""

    def gram(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """X X^T, (b, m, m); `out` is memory for it."""
        ...

    def frobenius(self, X: Tensor) -> Tensor:
        """||X||_F as `frobenius` gives it, (b, 1, 1)."""
        ...

    def count(self, X: Tensor) -> int:
        """How many there are."""
        ...


class _All:
    """X has them all."""

    def gram(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        return kernels.gram(X, out=out)

    def frobenius(self, X: Tensor) -> Tensor:
        return frobenius(X)

    def count(self, X: Tensor) -> int:
        return X.shape[-1]


ALL: Columns = _All()


@runtime_checkable
class ColumnSolver(Protocol):
    """A solver of the polar factor that can do with some of a matrix's columns: of X (b, m, n), m <= n columns in all."""

    def of_columns(self, X: Tensor, columns: Columns) -> Tensor: ...


@runtime_checkable
class QuinticSolver(ColumnSolver, Protocol):
    """One that applies quintics to X / ||X||_F, multiplied in `dtype` ("auto" or a name).

    `form(m, n, work, half)` is the iteration for (b, m, n) with m <= n in the precision `work`, as `iteration.cheaper_form`
    describes it, and the quintics it is to be given; `half` says that symmetric products cost half.
    """

    @property
    def dtype(self) -> str: ...

    def form(
        self, m: int, n: int, work: torch.dtype, half: bool = False
    ) -> tuple[Callable[..., Tensor], Sequence[tuple[float, float, float]]]: ...


@runtime_checkable
class ColumnFunctionSolver(Protocol):
    """The same for spectral functions."""

    def apply_to_columns(self, X: Tensor, f: SpectralFunction, columns: Columns) -> Tensor: ...


def dtype_name(dtype: torch.dtype | str | None) -> str:
    """The plain name of a working precision; `None` and `"auto"` leave the choice to the device."""
    if dtype is None or dtype == "auto":
        return "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or 'auto', got {dtype!r}.")
    return name


def working_dtype(X: Tensor, name: str) -> torch.dtype:
    """The dtype a solver multiplies in: as named, or the fastest the device offers without asking for more bits.

    `auto` keeps fp64 for fp64 input. Otherwise it is fp16 on tensor cores (CUDA from sm70), which multiply it as fast as
    bf16 where they know both, and it has three more bits; bf16 on CPUs with AMX or AVX512-BF16; and fp32 elsewhere.
    """
    if name != "auto":
        return DTYPES[name]
    if X.dtype == torch.float64:
        return torch.float64
    if X.device.type == "cuda":
        return torch.float16 if _capability(X.device)[0] >= 7 else torch.float32
    if X.device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return torch.float32


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _cpu_multiplies_bf16() -> bool:
    # torch has no public query; without these private ones the answer is the safe one, fp32.
    queries = (getattr(torch.cpu, n, None) for n in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(query() for query in queries if query is not None)


def check_matrices(X: Tensor, what: str) -> None:
    """Refuse what has no real polar factor; `what` is the caller's name for the argument."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{what} must be a torch.Tensor, got {type(X).__name__}.")
    if X.ndim < 2:
        raise ValueError(f"{what} must be a matrix or a batch (*b, m, n), got shape {tuple(X.shape)}.")
    if X.is_complex() or not X.is_floating_point():
        raise TypeError(f"{what} must be real floating point, got {X.dtype}; cast it, or take real and imaginary parts.")


def check_steps(steps: int) -> None:
    """Refuse a number of steps that is none."""
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise ValueError(f"steps must be a whole number, got {steps!r}.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")


def frobenius(X: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """||X||_F per matrix, (b, m, n) -> (b, 1, 1) in fp32 (fp64 for fp64 input), no less than a normal number; 1 for zero.

    Where X has some of the columns, `total` turns its norms, 0 among them, into those of the whole matrices.

    Squares of fp32 numbers fit into fp64. A CPU would convert the whole matrix for that sum, so it sums in fp32 and looks
    (there nothing waits) whether a norm is near the end of fp32's range.
    """
    if X.device.type == "cpu":
        wide = X.to(torch.promote_types(X.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
        if not bool(((norm > 1e-15) & (norm < 1e15)).all()):
            # By a power of two, which rounds nothing: the norm has the bits it would have in the middle of the range.
            exponent = torch.frexp(wide.abs().amax(dim=(-2, -1), keepdim=True)).exponent
            norm = torch.ldexp(torch.linalg.vector_norm(torch.ldexp(wide, -exponent), dim=(-2, -1), keepdim=True), exponent)
        elif total is None:
            return norm
    else:
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        norm = norm.to(torch.promote_types(X.dtype, torch.float32))
    if total is not None:
        norm = total(norm)
    # A denormal norm has few bits: rounded down by a tenth it would leave X / ||X|| outside a polynomial's range.
    return torch.where(norm == 0, 1, norm.clamp(min=torch.finfo(norm.dtype).tiny))


def normalised(X: Tensor, dtype: torch.dtype, columns: Columns = ALL) -> Tensor:
    """`X / ||X||_F` per matrix (b, m, n) in `dtype`; zero stays zero."""
    return kernels.quotient(X, columns.frobenius(X), dtype)


def on_wide_batch(X: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Run `f` on `X` seen as (b, m, n) with m <= n, and give its result `X`'s shape and dtype."""
    if X.numel() == 0:
        return X.clone()
    tall = X.shape[-2] > X.shape[-1]
    Y = X.mT if tall else X
    Y = f(Y.reshape(-1, *Y.shape[-2:])).reshape(Y.shape)
    return (Y.mT if tall else Y).to(X.dtype)
