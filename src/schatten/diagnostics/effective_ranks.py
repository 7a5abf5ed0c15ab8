"""How many singular values a matrix really has: three answers between 1 and its rank.

    stable rank <= nuclear ratio <= effective rank <= rank

The ratio and the effective rank are exp of the Renyi entropies of order 2 and 1 of the normalised singular values, hence the
order. All are 0 for a zero matrix and r = min(m, n) for one whose singular values are equal, and none sees scale, rotations
or transposition.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from schatten.diagnostics.nuclear_norm import nuclear_norm
from schatten.diagnostics.singular_values import share, singular_values
from schatten.maps.lifts import safe_norm
from schatten.metrics import spectral_norm

COLUMNS: Mapping[str, str] = {
    "frobenius": "Frobenius norm, in the matrix's unit",
    "nuclear": "nuclear norm, the sum of the singular values, in the matrix's unit",
    "nuclear_ratio": "nuclear norm^2 / Frobenius norm^2, from 1 to min(m, n)",
    "stable_rank": "Frobenius norm^2 / spectral norm^2, from 1 to min(m, n); from above without exact",
    "effective_rank": "exp of the entropy of the normalised singular values, from 1 to min(m, n); with exact only",
}


def nuclear_ratio(matrix: Tensor) -> Tensor:
    """||G||_*^2 / ||G||_F^2 of matrices (*b, m, n), (*b) in fp64, from 1 to min(m, n); one SVD without vectors.

    How much more an orthogonalised step can win than a Euclidean one of the same curvature (arXiv 2505.23737, criterion (4)).
    0 for a zero matrix, nan for one that is not finite; raises as `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.gradient import nuclear_ratio
        >>> round(float(nuclear_ratio(torch.eye(5))), 6), round(float(nuclear_ratio(torch.ones(5, 5))), 6)
        (5.0, 1.0)
    """
    return _ratio(singular_values(matrix))


def stable_rank(matrix: Tensor) -> Tensor:
    """||G||_F^2 / ||G||_op^2 of matrices (*b, m, n), (*b) in fp64, from 1 to min(m, n); one SVD without vectors.

    0 for a zero matrix, nan for one that is not finite; raises as `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.gradient import stable_rank
        >>> round(float(stable_rank(torch.diag(torch.tensor([2.0, 1.0])))), 6)
        1.25
    """
    return _stable(singular_values(matrix))


def effective_rank(matrix: Tensor) -> Tensor:
    """exp(-sum of p_i log p_i) with p = s / sum(s), of matrices (*b, m, n): (*b) in fp64, from 1 to min(m, n).

    The definition of Roy and Vetterli (2007), with singular values, not their squares. One SVD without vectors. 0 for a zero
    matrix, nan for one that is not finite; raises as `singular_values`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.gradient import effective_rank
        >>> round(float(effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0])))), 6)
        2.0
    """
    return _effective(singular_values(matrix))


def measures(matrix: Tensor, *, exact: bool) -> dict[str, Tensor]:
    """What `COLUMNS` names, (*b, m, n) -> (*b) each in fp64: by one SVD, or by one msgn and 16 power iterations."""
    if exact:
        s = singular_values(matrix)
        norms = {"frobenius": torch.linalg.vector_norm(s, dim=-1), "nuclear": s.sum(-1)}
        return {**norms, "nuclear_ratio": _ratio(s), "stable_rank": _stable(s), "effective_rank": _effective(s)}
    G = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    fro = safe_norm(G, (-2, -1))[..., 0, 0].double()
    nuc = nuclear_norm(G)
    return {
        "frobenius": fro + 0.0 * fro,
        "nuclear": nuc,
        "nuclear_ratio": share(nuc, fro).square(),
        "stable_rank": share(fro, spectral_norm(G).double()).square(),
    }


# Of singular values (*b, r) in shares of the largest, so that no square over- or underflows.


def _ratio(s: Tensor) -> Tensor:
    u = share(s, s[..., :1])
    return share(u.sum(-1).square(), u.square().sum(-1))


def _stable(s: Tensor) -> Tensor:
    return share(s, s[..., :1]).square().sum(-1)


def _effective(s: Tensor) -> Tensor:
    total = s.sum(-1, keepdim=True)
    entropy = torch.special.entr(share(s, total)).sum(-1)
    return torch.where(total[..., 0] == 0, 0.0, entropy.exp())
