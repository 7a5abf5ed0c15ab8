"""Block-diagonal mass: the share of a Hessian's ||H||_F^2 that lies within the rows, or the columns, of a weight matrix.

Split the entries into parts, such as rows, and H into blocks H_pq. For random signs x on all entries and one sign s_p for each
part, z = s H (s x) has the parts z_p = H_pp x_p + sum_{q != p} s_p s_q H_pq x_q: the signs cancel in the diagonal block and
nowhere else. So for independent signs s, s' of one x, E <z, z'> = sum_p E ||H_pp x_p||^2 = sum_p ||H_pp||_F^2, all parts at
once. With S patterns of signs for one x, all S (S - 1) / 2 pairs count.

Where a few eigenvalues make most of H, samples vary much. So Lanczos first finds a matrix A of low rank near H, whose masses
are known, and what the same signs say of A is taken off: only H - A and how it meets A are left to chance.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Estimate, Need
from schatten.diagnostics.deflation import look
from schatten.diagnostics.probes import rademacher, ratio_of

Partition = Literal["rows", "columns"] | Tensor


def block_masses(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    partitions: Mapping[str, Partition],
    *,
    probes: int = 8,
    patterns: int = 4,
    steps: int = 20,
    seed: int = 0,
) -> dict[str, Estimate]:
    """sum_p ||H_pp||_F^2 / ||H||_F^2 over the parts p of each partition; a share by the partition's name. NaN for H = 0.

    1 says that H is block-diagonal in the parts. Without any structure a share is not 0: where all entries of H have the same
    size it is the sum over parts of (entries of the part / N)^2, 1 / m for rows of a matrix (m, n). Estimates are not clamped.

    Cost: steps + probes * (1 + (patterns - 1) * partitions) Hessian-vector products. Memory: about 3 * steps vectors of `like`.

    Args:
        product: H v, symmetric, from a tensor of `like`'s shape to one.
        like: (*b, m, n), for shape, precision and device.
        partitions: "rows" or "columns" of each matrix, or the number of each entry's part, integers of `like`'s shape.
        probes: independent x, at least 2; an error bar falls as 1 / sqrt(probes).
        patterns: of signs for each x, at least 2; few but more than 2 give the least error for a number of products.
        steps: of Lanczos, the rank of A, at least 1.
        seed: of x and signs, drawn on the CPU, the same on every device.

    Raises ValueError for fewer than two probes or patterns, and for a partition that is none.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_mass import block_masses
        >>> Q = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> found = block_masses(lambda V: V @ Q, torch.zeros(5, 2), {"rows": "rows", "columns": "columns"})
        >>> round(float(found["rows"].value), 6), bool(found["columns"].value < 0.95)
        (1.0, True)
    """
    if probes < 2 or patterns < 2 or steps < 1:
        raise ValueError(
            f"An error bar needs at least 2 probes, a share at least 2 patterns of signs and a step of Lanczos, got {probes=}, "
            f"{patterns=}, {steps=}."
        )
    parts = {name: _parts(partition, like) for name, partition in partitions.items()}
    generator = torch.Generator().manual_seed(seed)
    run = look(product, like, steps, generator)
    values, vectors = run.ritz.values, run.vectors()
    del run
    known = {name: _mass_of_low_rank(values, vectors, *part) for name, part in parts.items()}
    masses: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in parts}

    def both(V: Tensor) -> Tensor:
        """H V and A V, (2, N)."""
        seen = vectors @ V.reshape(-1).to(vectors)
        return torch.stack([product(V).detach().reshape(-1).double(), (values * seen) @ vectors.to(values)])

    for _ in range(probes):
        x = rademacher(like, generator)
        plain = both(x)
        for name, (numbers, count) in parts.items():
            found = [plain]
            for _ in range(patterns - 1):
                signs = rademacher(like.new_empty(count), generator)[numbers]
                found.append(signs.reshape(-1) * both(signs * x))
            z = torch.stack(found)
            own = z.square().sum((0, 2))
            pairs = (z.sum(0).square().sum(1) - own) / (patterns * (patterns - 1))
            all_of_it = own / patterns
            masses[name].append((known[name] + pairs[0] - pairs[1], values.square().sum() + all_of_it[0] - all_of_it[1]))
    return {name: ratio_of(*(torch.stack(side) for side in zip(*found, strict=True))) for name, found in masses.items()}


def block_mass(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    partition: Partition = "rows",
    *,
    probes: int = 8,
    patterns: int = 4,
    steps: int = 20,
    seed: int = 0,
) -> Estimate:
    """`block_masses` of one partition; steps + probes * patterns Hessian-vector products.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.block_mass import block_mass
        >>> Q = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> value, error = block_mass(lambda V: V @ Q, torch.zeros(5, 2), "rows")
        >>> round(float(value), 6), bool(error < 1e-6)
        (1.0, True)
    """
    return block_masses(product, like, {"one": partition}, probes=probes, patterns=patterns, steps=steps, seed=seed)["one"]


@dataclass(frozen=True)
class BlockMass:
    """The share of ||H||_F^2 within rows and within columns, of each parameter's diagonal block of the Hessian.

    The logical matrices of one parameter (heads, experts) are taken together; entries of two of them are never in one part.
    """

    name: ClassVar[str] = "block_mass"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    columns: ClassVar[Mapping[str, str]] = {
        "rows": "share of ||H||_F^2 between entries of one row, 0 to 1; 1 / rows without structure",
        "rows_error": "its standard error",
        "columns": "share of ||H||_F^2 between entries of one column, 0 to 1; 1 / columns without structure",
        "columns_error": "its standard error",
    }
    cost: ClassVar[str] = "steps + probes * (2 * patterns - 1) Hessian-vector products"

    probes: int = 8
    patterns: int = 4
    steps: int = 20
    seed: int = 0

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.hessian is not None
        found = block_masses(
            of.hessian,
            of.weight,
            {"rows": "rows", "columns": "columns"},
            probes=self.probes,
            patterns=self.patterns,
            steps=self.steps,
            seed=self.seed,
        )
        return {f"{k}{end}": v for k, e in found.items() for end, v in (("", e.value), ("_error", e.error))}


QUANTITY = BlockMass


def _parts(partition: Partition, like: Tensor) -> tuple[Tensor, int]:
    """The number of each entry's part, from 0 on, in `like`'s shape, and how many parts there are."""
    if isinstance(partition, Tensor):
        if partition.shape != like.shape or partition.is_floating_point() or partition.is_complex():
            raise ValueError(
                f"partition must give each entry the number of its part: integers of shape {tuple(like.shape)}, "
                f"got {partition.dtype} of shape {tuple(partition.shape)}."
            )
        names, numbers = torch.unique(partition.to(like.device), return_inverse=True)
        return numbers, len(names)
    if partition not in ("rows", "columns") or like.dim() < 2:
        raise ValueError(
            f'partition must be "rows" or "columns" of matrices (*b, m, n), or a tensor of integers; got {partition!r} for '
            f"shape {tuple(like.shape)}."
        )
    *b, m, n = like.shape
    matrices = like[..., 0, 0].numel()
    firsts = torch.arange(matrices, device=like.device).view(*b, 1, 1)
    if partition == "rows":
        return (firsts * m + torch.arange(m, device=like.device)[:, None]).expand(like.shape), matrices * m
    return (firsts * n + torch.arange(n, device=like.device)).expand(like.shape), matrices * n


def _mass_of_low_rank(values: Tensor, vectors: Tensor, numbers: Tensor, count: int) -> Tensor:
    """sum_p ||A_pp||_F^2 of A = sum_j values_j y_j y_j^T, from the products of its vectors y (k, N) within each part."""
    total = values.new_zeros(())
    for value, y in zip(values, vectors, strict=True):
        # (k, parts): of y with every vector.
        within = values.new_zeros(len(values), count).index_add_(1, numbers.reshape(-1), (vectors * y).double())
        total = total + value * (values[:, None] * within.square()).sum()
    return total
