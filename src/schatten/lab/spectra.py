"""Singular values of matrices that lie in a file: of one matrix at a time, in fp64, read in slices of bounded size.

| method | for | accuracy of the singular values |
|---|---|---|
| `svd` | at most 512 rows or columns, and 2^19 entries | rounding in fp64 |
| `gram` | others, up to `max_size` | from the eigenvalues of the Gram matrix of the smaller side: sigma_1 eps / 2 for large ones, those below sigma_1 sqrt(n eps), 1e-6 of it, are lost |
| `krylov` | beyond | the leading ones alone, from below, with a residual that bounds their distance to true ones |
"""  # noqa: E501

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SVD_SIDE = 512
SVD_ENTRIES = 1 << 19

# Entries of a slice: 32 MiB in fp64.
SLICE = 1 << 22

# Singular values kept in one piece of memory: 8 MiB.
KEPT = 1 << 20

# Vectors of a block, and products of the Krylov space: of a Gaussian 14336 x 4096, the hard case, sigma_1 comes out 0.2 % low.
BLOCK = 8
PRODUCTS = 12

EPS = torch.finfo(torch.float64).eps


class Workspace:
    """Memory that is taken once: for slices, and for the singular values that stay.

    A small result kept in the hole that a large buffer has left would make the next such buffer take new memory, and the
    process grow by each matrix.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self._kept = torch.empty(0, dtype=torch.float64)

    def keep(self, values: Tensor) -> Tensor:
        """A copy of `values` (r) on the host among those kept before."""
        if self._kept.numel() < len(values):
            self._kept = torch.empty(max(KEPT, len(values)), dtype=torch.float64)
        own, self._kept = self._kept.tensor_split([len(values)])
        return own.copy_(values)

    def slot(self, number: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Buffer `number` as (rows, columns), with what it held before."""
        size = rows * columns
        if (number, dtype) not in self._buffers or self._buffers[number, dtype].numel() < size:
            self._buffers[number, dtype] = torch.empty(max(size, SLICE), dtype=dtype, device=self.device)
        return self._buffers[number, dtype][:size].view(rows, columns)


@dataclass(frozen=True)
class Matrix:
    """`first`, or second - first where `second` is given, as a tall matrix: (rows, columns) with rows >= columns."""

    workspace: Workspace
    first: Tensor
    second: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.first.shape
        return max(rows, columns), min(rows, columns)

    def slices(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, int, Tensor]]:
        """(from, to, rows from .. to of the tall matrix) in turn, each in the place of the one before."""
        return self._cut(self.first.shape[0] < self.first.shape[1], dtype)

    def entries(self) -> Iterator[Tensor]:
        """All entries once, in the order of the file, where the columns of a wide matrix lie far apart."""
        return (part for *_, part in self._cut(self.first.stride(0) < self.first.stride(1), torch.float64))

    def _cut(self, turned: bool, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
        views = [t.T if turned else t for t in (self.first, self.second) if t is not None]
        rows, columns = views[0].shape
        step = max(1, SLICE // max(columns, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            slots = (self.workspace.slot(i, stop - start, columns, dtype) for i in range(len(views)))
            parts = [slot.copy_(view[start:stop]) for slot, view in zip(slots, views, strict=True)]
            yield start, stop, parts[0] if len(parts) == 1 else parts[1].sub_(parts[0])

    def times(self, X: Tensor) -> Tensor:
        """A X."""
        return torch.cat([part @ X for _, _, part in self.slices(X.dtype)])

    def transposed_times(self, Y: Tensor) -> Tensor:
        """A^T Y."""
        total = Y.new_zeros(self.shape[1], Y.shape[1])
        for start, stop, part in self.slices(Y.dtype):
            total.addmm_(part.T, Y[start:stop])
        return total


@dataclass(frozen=True)
class Spectrum:
    """Singular values, descending, in fp64 on the host: all, or of `krylov` the largest alone.

    `floor` is what a singular value must exceed to be told from rounding, `residual` bounds the relative error of the largest;
    `left` and `right` are leading singular vectors in columns where they were asked for. Of a matrix that is not finite there
    are no values, and `nonfinite` says how many entries are not.
    """

    values: Tensor
    method: str
    frobenius: float
    nonfinite: int = 0
    floor: float = 0.0
    residual: float = 0.0
    left: Tensor | None = None
    right: Tensor | None = None


def spectrum(matrix: Matrix, *, max_size: int, vectors: int = 0) -> Spectrum:
    """The spectrum of a matrix, of its smaller side up to `max_size` exactly, with `vectors` leading singular vectors."""
    rows, columns = matrix.shape
    if rows * columns == 0:
        return Spectrum(torch.zeros(0, dtype=torch.float64), "svd", 0.0)
    size, nonfinite = _extent(matrix)
    if nonfinite:
        return Spectrum(torch.zeros(0, dtype=torch.float64), "-", math.nan, nonfinite)
    if size == 0:
        return Spectrum(torch.zeros(columns, dtype=torch.float64), "svd", 0.0)
    vectors = min(vectors, columns)
    if columns <= SVD_SIDE and rows * columns <= SVD_ENTRIES:
        return _by_svd(matrix, vectors)
    return _by_gram(matrix, size, vectors) if columns <= max_size else _by_krylov(matrix, size, vectors)


def _extent(matrix: Matrix) -> tuple[float, int]:
    """The largest entry in size, and how many entries are not finite."""
    size, nonfinite = 0.0, 0
    for part in matrix.entries():
        # Four times as fast as the norm; both pass nan on.
        low, high = torch.aminmax(part)
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            nonfinite += int((~part.isfinite()).sum())
        else:
            size = max(size, largest)
    return size, nonfinite


def _by_svd(matrix: Matrix, vectors: int) -> Spectrum:
    ((_, _, A),) = matrix.slices()
    U, s, Vh = torch.linalg.svd(A, full_matrices=False) if vectors else (None, torch.linalg.svdvals(A), None)
    left, right = (None, None) if U is None or Vh is None else (U[:, :vectors], Vh[:vectors].T)
    floor = float(s[0]) * EPS * max(A.shape)
    return Spectrum(matrix.workspace.keep(s), "svd", float(torch.linalg.vector_norm(s)), 0, floor, EPS, left, right)


def _by_gram(matrix: Matrix, size: float, vectors: int) -> Spectrum:
    n = matrix.shape[1]
    G = torch.zeros(n, n, dtype=torch.float64, device=matrix.workspace.device)
    for _, _, part in matrix.slices():
        # In shares of the largest entry, so that no square over- or underflows.
        part.div_(size)
        G.addmm_(part.T, part)
    frobenius = size * math.sqrt(float(G.diagonal().sum()))
    values, V = torch.linalg.eigh(G) if vectors else (torch.linalg.eigvalsh(G), None)
    s = size * values.flip(0).clamp(min=0).sqrt()
    right = None if V is None else V[:, -vectors:].flip(1)
    left = None if right is None else torch.linalg.qr(matrix.times(right) / size)[0]
    return Spectrum(matrix.workspace.keep(s), "gram", frobenius, 0, float(s[0]) * math.sqrt(n * EPS), n * EPS, left, right)


def _by_krylov(matrix: Matrix, size: float, vectors: int) -> Spectrum:
    """Rayleigh-Ritz in the block Krylov space of A^T A, products in fp32 (Musco and Musco, 2015)."""
    n = matrix.shape[1]
    squares = [float(torch.linalg.vector_norm(part.div_(size)).square()) for part in matrix.entries()]
    frobenius = size * math.sqrt(math.fsum(squares))
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, max(BLOCK, vectors), generator=generator).to(matrix.workspace.device)
    basis = torch.linalg.qr(X)[0]
    for _ in range(PRODUCTS):
        X = matrix.transposed_times(matrix.times(basis[:, -X.shape[1] :]) / size) / size
        # Twice is enough for orthogonality (Kahan and Parlett).
        for _ in range(2):
            X = torch.linalg.qr(X - basis @ (basis.T @ X))[0]
        basis = torch.cat([basis, X], dim=1)
        if basis.shape[1] + X.shape[1] > n:
            break
    Y = matrix.times(basis) / size
    U, s, Wh = torch.linalg.svd(Y.double(), full_matrices=False)
    right = basis.double() @ Wh.T
    # Of a pair (s, u, v) with A v = s u, an eigenvalue of A^T A lies within |A^T u s - s^2 v| of s^2.
    lead = matrix.transposed_times((U[:, :1] * s[0]).float()).double() / size
    residual = float(torch.linalg.vector_norm(lead - s[0] ** 2 * right[:, :1]) / s[0] ** 2) / 2
    found = matrix.workspace.keep(size * s[:1])
    if not vectors:
        return Spectrum(found, "krylov", frobenius, 0, 0.0, residual)
    return Spectrum(found, "krylov", frobenius, 0, 0.0, residual, U[:, :vectors], right[:, :vectors])


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (r) (Roy and Vetterli, 2007), as `schatten.diagnostics` has it."""
    total = float(values.sum())
    return math.exp(float(torch.special.entr(values / total).sum())) if total > 0 else 0.0


def overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Principal angles between two subspaces, (n, k) orthonormal columns each: their mean squared cosine, and the largest.

    The mean is 1 for equal subspaces and k / n on average for unrelated ones; the angle is in degrees.
    """
    cosines = torch.linalg.svdvals(first.T @ second).clamp(max=1.0)
    return float(cosines.square().mean()), math.degrees(math.acos(float(cosines.min())))
