"""The Hessian of a block written out, (N, N), from N products, and what the estimates estimate, computed from it exactly."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Exact(NamedTuple):
    """An explicit Hessian.

    Attributes:
        matrix: (N, N), symmetric, over the entries of `like` in their order in memory: a matrix is read row by row.
        asymmetry: ||A - A^T||_F / ||A||_F of the products before they were made symmetric: rounding, or `product` is no
            Hessian.
    """

    matrix: Tensor
    asymmetry: Tensor


class Structure(NamedTuple):
    """Numbers of an explicit symmetric matrix, in its units; the effective rank has none.

    Attributes:
        nuclear: ||H||_*, the sum of |eigenvalues|.
        operator: ||H||_op, the largest |eigenvalue|: L.
        frobenius: ||H||_F.
        trace: tr H.
        effective_rank: ||H||_* / ||H||_op, 0 for H = 0.
    """

    nuclear: Tensor
    operator: Tensor
    frobenius: Tensor
    trace: Tensor
    effective_rank: Tensor


def exact_hessian(product: Callable[[Tensor], Tensor], like: Tensor, *, limit: int = 10_000) -> Exact:
    """The Hessian of a block of N entries, one product per column; N Hessian-vector products.

    Memory: N^2 numbers of `like`'s precision, at least fp32, and twice that for a moment.

    Args:
        product: H v, from a tensor of `like`'s shape to one.
        like: any shape with N entries; only shape, precision and device are read.
        limit: the largest N that is allowed.

    Raises ValueError for more than `limit` entries, with what they would need.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_hessian import exact_hessian
        >>> P = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> H = exact_hessian(lambda V: P @ V, torch.zeros(2, 2))
        >>> torch.equal(H.matrix, torch.kron(P, torch.eye(2))), float(H.asymmetry)
        (True, 0.0)
    """
    N = like.numel()
    dtype = torch.promote_types(like.dtype, torch.float32)
    if N > limit:
        raise ValueError(
            f"The explicit Hessian of a block of shape {tuple(like.shape)} is {N} x {N}, more than limit={limit} allows: it "
            f"needs {N} products and {2 * N * N * dtype.itemsize / 2**30:.1f} GiB. Give a larger limit, or estimate by "
            f"hessian_rank and block_mass, which need a hundred products."
        )
    A = torch.empty(N, N, dtype=dtype, device=like.device)
    for i in range(N):
        unit = torch.zeros(N, dtype=dtype, device=like.device)
        unit[i] = 1
        A[i] = product(unit.view(like.shape)).detach().reshape(-1)
    size = torch.linalg.matrix_norm(A)
    symmetric = (A + A.mT).div_(2)
    # The antisymmetric part is (A - A^T) / 2 = A - symmetric.
    part = torch.linalg.matrix_norm(A.sub_(symmetric))
    return Exact(symmetric, torch.where(size > 0, 2 * part / size, part))


def block_hessian(product: Callable[[Tensor], Tensor], like: Tensor, *, limit: int = 10_000) -> Tensor:
    """`exact_hessian(...)`'s matrix alone, (N, N), symmetric; N Hessian-vector products.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_hessian import block_hessian
        >>> block_hessian(lambda v: 2 * v, torch.zeros(2))
        tensor([[2., 0.],
                [0., 2.]])
    """
    return exact_hessian(product, like, limit=limit).matrix


def structure(matrix: Tensor) -> Structure:
    """Norms, trace and effective rank of a symmetric (*b, N, N) -> (*b), from its eigenvalues in fp64.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_hessian import structure
        >>> found = structure(torch.diag(torch.tensor([4.0, -2.0, 0.0])))
        >>> round(float(found.nuclear), 6), round(float(found.effective_rank), 6)
        (6.0, 1.5)
    """
    values = torch.linalg.eigvalsh(matrix.double())
    nuclear, operator = values.abs().sum(-1), values.abs().amax(-1)
    rank = torch.where(operator > 0, nuclear / operator, 0.0)
    return Structure(nuclear, operator, torch.linalg.vector_norm(values, dim=-1), values.sum(-1), rank)


def mass_within(matrix: Tensor, shape: tuple[int, ...], partition: Literal["rows", "columns"] | Tensor) -> Tensor:
    """The share of ||H||_F^2 in entries whose two indices lie in one part, of an explicit H (N, N); fp64, NaN for H = 0.

    Args:
        matrix: over the entries of a block in their order in memory.
        shape: of the block, (*b, m, n).
        partition: "rows" or "columns" of each of its matrices, or a number for each entry, in any integer tensor of `shape`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_hessian import mass_within
        >>> H = torch.kron(torch.eye(2), torch.ones(3, 3))
        >>> float(mass_within(H, (2, 3), "rows")), round(float(mass_within(H, (2, 3), "columns")), 3)
        (1.0, 0.333)
    """
    if isinstance(partition, Tensor):
        parts = partition
    else:
        m, n = shape[-2:]
        numbers = torch.arange(matrix.shape[-1], device=matrix.device).view(shape)
        parts = (numbers // n) if partition == "rows" else (numbers // (m * n)) * n + numbers % n
    parts = parts.reshape(-1).to(matrix.device)
    squares = matrix.double().square()
    return torch.where(parts[:, None] == parts, squares, 0.0).sum() / squares.sum()
