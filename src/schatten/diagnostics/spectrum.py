"""Spectra: the singular values of weights and momentum, and histograms of them with bins that stay the same over a training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.singular_values import share, singular_values

Part = Literal["weight", "momentum"]

QUANTILES = {"max": 1.0, "q90": 0.9, "median": 0.5, "q10": 0.1, "min": 0.0}


def spectrum(matrix: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The singular values of matrices (*b, m, n), descending, (*b, min(m, n)) in `dtype`, in the matrix's unit.

    Exact to rounding, about eps ||X||_op each: fp32 takes half the time and memory of fp64 and knows nothing below 1e-6 of
    the largest. One SVD without vectors, which makes the host wait on a GPU. nan for a matrix that is not finite.

    Raises TypeError for anything but a real floating-point tensor, ValueError for fewer than two dimensions or another dtype.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.spectrum import spectrum
        >>> [round(s, 4) for s in spectrum(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).tolist()]
        [5.0, 0.0]
    """
    return singular_values(matrix, dtype=dtype)


def histogram(values: Tensor, edges: Tensor) -> Tensor:
    """How many of the values (*b, r) lie in each bin [edge, next edge): (*b, k) counts for k + 1 ascending edges, in fp64.

    What lies below the first edge counts in the first bin, what lies on or above the last in the last: counts add up to r. A
    nan makes all counts of its matrix nan. Nothing waits for the device.

    Raises ValueError for edges that are no vector of at least two.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.spectrum import histogram
        >>> histogram(torch.tensor([0.1, 1.5, 1.6, 7.0]), torch.tensor([0.0, 1.0, 2.0, 3.0])).tolist()
        [1.0, 2.0, 1.0]
    """
    if edges.ndim != 1 or edges.numel() < 2:
        raise ValueError(f"edges must be at least two ascending numbers, (k + 1,), got shape {tuple(edges.shape)}.")
    inner = edges[1:-1].to(values)
    bins = torch.bucketize(values.contiguous(), inner.contiguous(), right=True)
    counts = torch.zeros(*values.shape[:-1], edges.numel() - 1, dtype=torch.float64, device=values.device)
    counts.scatter_add_(-1, bins, torch.ones_like(values, dtype=torch.float64))
    return counts + 0.0 * values.double().sum(-1, keepdim=True)


def log_edges(lowest: float, highest: float, bins: int, *, device: torch.device | str = "cpu") -> Tensor:
    """`bins` + 1 edges from `lowest` to `highest`, equally far apart in the logarithm, in fp64.

    Raises ValueError unless 0 < lowest < highest < inf and bins is at least 1.

    Example:
        >>> from schatten.diagnostics.spectrum import log_edges
        >>> [round(edge, 6) for edge in log_edges(0.01, 10, 3).tolist()]
        [0.01, 0.1, 1.0, 10.0]
    """
    if not 0 < lowest < highest < math.inf or bins < 1:
        raise ValueError(f"Edges need 0 < lowest < highest < inf and bins >= 1, got {lowest}, {highest} and bins={bins}.")
    return torch.logspace(math.log10(lowest), math.log10(highest), bins + 1, dtype=torch.float64, device=device)


def by_part(values: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Values of blocks (blocks, *s) by the operand they belong to, (blocks / len(names), *s) each.

    A fused projection whose layout splits it into equal operands has their blocks in turn, all heads of one before those of the
    next: `names` are ("q", "k", "v") for an attention, ("gate", "up") for a gated unit. With grouped queries q is a
    piece of its own ("name.0") and the other ("name.1") has ("k", "v").

    Raises ValueError where the names do not divide the blocks.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.spectrum import by_part
        >>> {name: t.tolist() for name, t in by_part(torch.arange(6), ("q", "k", "v")).items()}
        {'q': [0, 1], 'k': [2, 3], 'v': [4, 5]}
    """
    if not names or values.ndim == 0 or values.shape[0] % len(names):
        raise ValueError(f"names must divide the blocks, the first dimension of {tuple(values.shape)}, got {tuple(names)}.")
    return dict(zip(names, values.chunk(len(names)), strict=True)) if values.shape[0] else dict.fromkeys(names, values)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of the weight and the momentum of each matrix: quantiles, stable rank and a histogram.

    Histograms have `bins` equal in the logarithm, from the first to the second number of `weight` and `momentum`, the same at
    every step, so that histograms of a training can be laid side by side; values outside count in the end bins.
    `edges("weight")` are their edges. The momentum's columns are missing for a rule that keeps none. Where a layout cuts a
    fused projection, W_Q, W_K and W_V are blocks of their own: `by_part` says which.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.core import Block
        >>> from schatten.diagnostics.spectrum import Spectrum
        >>> quantity = Spectrum(bins=4, weight=(0.01, 100.0))
        >>> found = quantity(Block("w", schatten.Rule(), {}, torch.diag(torch.tensor([3.0, 2.0, 0.5]))[None]))
        >>> round(float(found["weight_median"]), 4), found["weight_histogram"].tolist()
        (2.0, [[0.0, 1.0, 2.0, 0.0]])
    """

    name: ClassVar[str] = "spectrum"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"momentum"})
    columns: ClassVar[Mapping[str, str]] = {
        f"{of}_{name}": text
        for of in ("weight", "momentum")
        for name, text in {
            "max": f"largest singular value of the {of}",
            "q90": "90 % of its singular values are at most this",
            "median": "half of its singular values are at most this",
            "q10": "10 % of its singular values are at most this",
            "min": "smallest singular value",
            "stable_rank": "Frobenius norm^2 / spectral norm^2",
            "histogram": "singular values in each bin, a vector; bins of equal width in the logarithm",
        }.items()
    }
    cost: ClassVar[str] = "two SVDs without vectors, in fp64"

    bins: int = 64
    weight: tuple[float, float] = (1e-4, 1e4)
    momentum: tuple[float, float] = (1e-10, 1e2)

    def __post_init__(self) -> None:
        for of in ("weight", "momentum"):
            self.edges(of)

    def edges(self, of: Part, device: torch.device | str = "cpu") -> Tensor:
        """The edges of a histogram's bins, (bins + 1,)."""
        return log_edges(*(self.weight if of == "weight" else self.momentum), self.bins, device=device)

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        matrices: dict[Part, Tensor | None] = {"weight": of.weight, "momentum": of.momentum}
        for name, matrix in matrices.items():
            if matrix is not None:
                s = spectrum(matrix)
                found |= {f"{name}_{column}": torch.quantile(s, q, dim=-1) for column, q in QUANTILES.items()}
                found[f"{name}_stable_rank"] = share(s, s[..., :1]).square().sum(-1)
                found[f"{name}_histogram"] = histogram(s, self.edges(name, s.device))
        return found


QUANTITY = Spectrum
