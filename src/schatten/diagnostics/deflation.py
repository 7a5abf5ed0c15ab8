"""Deflation: what a run of Lanczos has seen is known exactly, and random probes need only look at the rest.

A trace over all directions is a sum over an orthonormal basis Q of a few and a mean over random z without their part in Q.
Where Q has caught the large eigenvalues, little is left to chance (Gambhir, Stathopoulos and Orginos 2017; Hutch++, Meyer et
al. 2021).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.lanczos import Ritz, lanczos
from schatten.diagnostics.probes import rademacher


class Seen(NamedTuple):
    """A run of Lanczos, and its basis (k, N), orthonormal, tensors flat and joined."""

    ritz: Ritz
    basis: Tensor

    def vectors(self) -> Tensor:
        """The Ritz vectors, (k, N), in the order of `ritz.values`."""
        _, turns = eigenvectors(tridiagonal(self.ritz, len(self.ritz.diagonal)))
        return turns.mT.to(self.basis) @ self.basis


def look(product: Callable[[Any], Any], like: Tensor | Sequence[Tensor], steps: int, generator: torch.Generator) -> Seen:
    """`lanczos` that keeps its basis; `steps` Hessian-vector products, for a moment three times as many vectors of memory.

    The Gaussian start comes from a generator on the CPU, from which probes may be drawn next: they must not depend on it.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.deflation import look
        >>> d = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
        >>> found = look(lambda v: d * v, d, 3, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(found.vectors().abs(), torch.eye(3).double()))
        True
    """
    parts = [like] if isinstance(like, Tensor) else list(like)
    start = torch.randn(sum(p.numel() for p in parts), generator=generator, dtype=torch.float64).to(parts[0].device)
    basis = []

    # Lanczos shows its basis to the product, one vector at a time.
    def seen(v: Any) -> Any:
        basis.append(torch.cat([t.reshape(-1) for t in ([v] if isinstance(v, Tensor) else v)]))
        return product(v)

    ritz = lanczos(seen, like, steps, start=start)
    return Seen(ritz, torch.stack(basis))


def rest_of_probe(basis: Tensor, known: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random signs z, (N), and what of them is orthogonal to those rows of an orthonormal basis (k, N) that `known` (k) marks.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.deflation import rest_of_probe
        >>> z, rest = rest_of_probe(torch.eye(3), torch.tensor([True, False, False]), torch.Generator().manual_seed(0))
        >>> rest.abs()
        tensor([0., 1., 1.])
    """
    z = rademacher(basis[0], generator)
    rest = z
    # The second time is for what rounding has left of large parts.
    for _ in range(2):
        rest = rest - (known * (basis @ rest)) @ basis
    return z, rest


def tridiagonal(ritz: Ritz, size: int) -> Tensor:
    """Lanczos's T after its first `size` steps, (size, size).

    Example:
        >>> import torch
        >>> from schatten.diagnostics.deflation import tridiagonal
        >>> from schatten.diagnostics.lanczos import lanczos
        >>> found = lanczos(lambda v: 2 * v, torch.ones(2), 2)
        >>> tridiagonal(found, 1)
        tensor([[2.]], dtype=torch.float64)
    """
    off = ritz.off_diagonal[: size - 1]
    return torch.diag(ritz.diagonal[:size]) + torch.diag(off, 1) + torch.diag(off, -1)


def eigenvectors(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of symmetric (*b, n, n), but eigenvalues NaN of what holds inf or NaN, where that may raise.

    A measurement of a run that has diverged must not end it.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.deflation import eigenvectors
        >>> eigenvectors(torch.full((2, 2), torch.nan))[0]
        tensor([nan, nan])
    """
    broken = ~torch.isfinite(A).all()
    values, vectors = torch.linalg.eigh(torch.where(broken, torch.eye(A.shape[-1]).to(A), A))
    return torch.where(broken, torch.nan, values), vectors
