"""Lambda-smoothness: the smallest matrix norm in which a Hessian is bounded, -I (x) Lambda <= H <= I (x) Lambda.

With vec stacking rows, I_m (x) Lambda is the quadratic form tr(A Lambda A^T), so Lambda is one curvature for all rows. It gives
the Frobenius smoothness L = ||Lambda||_op and the spectral one L_* = ||Lambda||_*, and Muon's bound beats gradient descent's
where L_* is much below r L (arXiv 2505.23737, assumption 4.5 and lemma 4.6). The Lambda of least trace is found by an
interior-point method, whose dual matrices prove that no other has a much smaller one; for large blocks, a Lambda from products.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.deflation import eigenvectors

# Of the gap at each step, which is where Newton's method aims; small is fast, but off the central path steps get short.
CENTRING = 0.1
# Forty are enough for 1e-6; the gap that is left after this many shows in `least`.
STEPS = 100
# More than this share of the largest entry is no rounding, whatever precision the products had.
ASYMMETRY = 1e-2


Side = Literal["right", "left"]


class WeightedSmoothness(NamedTuple):
    """A Lambda that bounds H, in fp64; all in units of the loss over the square of a weight but `margin` and `ratio`.

    Attributes:
        weights: Lambda, symmetric positive definite, (*b, n, n) for the right side, (*b, m, m) for the left.
        least: no Lambda that bounds H has a smaller trace.
        margin: 1 - ||Lambda^-1/2 H Lambda^-1/2||_op: the bound holds where this is not negative.
        rank: r = min(m, n), times the number of matrices.
    """

    weights: Tensor
    least: Tensor
    margin: Tensor
    rank: int

    @property
    def L(self) -> Tensor:
        """||Lambda||_op: ||grad f(W) - grad f(W')||_F <= L ||W - W'||_F, if Lambda bounds H all the way."""
        return eigenvectors(self.weights)[0].amax()

    @property
    def L_star(self) -> Tensor:
        """||Lambda||_*: ||grad f(W) - grad f(W')||_* <= L_* ||W - W'||_op, if Lambda bounds H all the way."""
        return self.weights.diagonal(dim1=-2, dim2=-1).sum()

    @property
    def ratio(self) -> Tensor:
        """L_* / (r L): the smaller, the more Muon's bound gains. Above 1 only where Lambda is wider than r; NaN for H = 0."""
        return self.L_star / (self.rank * self.L)


def weighted_smoothness(
    hessian: Tensor, shape: tuple[int, int], *, side: Side = "right", tolerance: float = 1e-4, limit: int = 2000
) -> WeightedSmoothness:
    """The Lambda of least trace with -I_m (x) Lambda <= H <= I_m (x) Lambda, for an explicit H.

    A semidefinite programme, solved by a primal-dual interior-point method. For H = P (x) Q the answer is ||P||_op |Q|, for
    H = vec(U) vec(U)^T its trace is ||U||_*^2. `margin` is found by eigenvalues, and is positive but for rounding.

    Cost: no products; 10 to 30 steps of Newton's method, each a few inverses of (N, N) and a system of n (n + 1) / 2 unknowns.
    Seconds for N = 500, minutes for 2000; beyond, `fit_weighted_smoothness` finds a Lambda from products.

    Args:
        hessian: (N, N) with N = m n, symmetric, over entries row by row, as `block_hessian` returns.
        shape: (m, n), fan_out x fan_in.
        side: "right" is the paper's, tr(A Lambda A^T) with Lambda (n, n); "left" is tr(A^T Lambda A) with Lambda (m, m).
        tolerance: how far tr Lambda may be above the least one, in units of it.
        limit: the largest N that is allowed.

    Raises ValueError for an H that is not (m n, m n), larger than `limit`, not finite, or not symmetric.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.weighted_smoothness import weighted_smoothness
        >>> Q = torch.tensor([[2.0, 1.0], [1.0, -3.0]]).double()
        >>> fit = weighted_smoothness(torch.kron(torch.eye(3).double(), Q), (3, 2))
        >>> nuclear = torch.linalg.matrix_norm(Q, "nuc")
        >>> bool((fit.L_star / nuclear - 1).abs() < 1e-3), bool(fit.least <= nuclear), bool(fit.margin > 0)
        (True, True, True)
    """
    m, n = shape
    if tuple(hessian.shape) != (m * n, m * n):
        raise ValueError(f"hessian must be ({m * n}, {m * n}) for a matrix of shape {shape}, got {tuple(hessian.shape)}.")
    if len(hessian) > limit:
        raise ValueError(
            f"hessian of shape {tuple(hessian.shape)} is larger than {limit=} allows: use fit_weighted_smoothness, which needs "
            f"products, or give a larger limit and wait."
        )
    if not torch.isfinite(hessian).all():
        raise ValueError(f"hessian must be finite, but one of shape {tuple(hessian.shape)} holds inf or NaN.")
    if not torch.allclose(hessian, hessian.mT, rtol=0, atol=ASYMMETRY * float(hessian.abs().max())):
        raise ValueError(f"hessian of shape {tuple(hessian.shape)} must be symmetric; block_hessian makes it so.")
    if side not in ("right", "left"):
        raise ValueError(f'side must be "right" or "left", got {side!r}.')
    H = hessian.double()
    if side == "left":
        H, m, n = H.view(m, n, m, n).permute(1, 0, 3, 2).reshape(m * n, m * n), n, m
    H = (H + H.mT) / 2
    size = torch.linalg.eigvalsh(H).abs().max()
    if size == 0:
        return WeightedSmoothness(H.new_zeros(n, n), H.new_zeros(()), H.new_ones(()), min(m, n))
    weights, least = _least_trace(H / size, m, n, tolerance)
    return WeightedSmoothness(weights * size, least * size, 1 - _scale_that_bounds(weights, H / size, m), min(m, n))


def _least_trace(H: Tensor, m: int, n: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Lambda within `tolerance` of the least trace for ||H||_op = 1, and a lower bound of that trace.

    Variables are Lambda, the slacks S = I (x) Lambda -+ H, and their multipliers Z, whose partial traces add up to I. Each step
    is Newton's for S Z = mu I, made symmetric as Helmberg, Kojima and Monteiro do.
    """
    # Twice |H|'s mean over rows, scaled until it bounds H: strictly inside, and up to the factor exact for H = P (x) Q.
    values, vectors = torch.linalg.eigh(H)
    start = _partial_trace((vectors * values.abs()) @ vectors.mT, m, n) / m
    start = start + 1e-3 * torch.eye(n).to(start) * start.diagonal().mean()
    weights = 2 * _scale_that_bounds(start, H, m) * start
    both = torch.tensor([-1.0, 1.0]).to(H)[:, None, None] * H
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(_kron(weights, m) + both))
    multipliers = _feasible(inverses, m, n)
    least = H.new_zeros(())
    for _ in range(STEPS):
        slacks = _kron(weights, m) + both
        # tr H (Z - Z') <= tr (I (x) Lambda)(Z + Z') = tr Lambda, whatever Lambda bounds H.
        least = torch.maximum(least, -(both * _feasible(multipliers, m, n)).sum())
        trace = weights.diagonal().sum()
        if trace - least <= tolerance * least:
            break
        inverses = torch.cholesky_inverse(torch.linalg.cholesky(slacks))
        mu = CENTRING * float((slacks * multipliers).sum()) / (2 * m * n)
        short = mu * _partial_trace(inverses.sum(0), m, n) - torch.eye(n).to(H)
        step = _solve(short, multipliers, inverses, m, n)
        turned = multipliers @ _kron(step, m) @ inverses
        change = mu * inverses - multipliers - (turned + turned.mT) / 2
        weights = weights + _inside(slacks, _kron(step, m).expand_as(slacks)) * step
        multipliers = multipliers + _inside(multipliers, change) * change
    return weights, least


def _solve(short: Tensor, multipliers: Tensor, inverses: Tensor, m: int, n: int) -> Tensor:
    """X symmetric, (n, n), for which the partial trace of the sum of Z (I (x) X) S^-1, made symmetric, is `short`."""
    system = short.new_zeros(n * n, n * n)
    for Z, R in zip(multipliers, inverses, strict=True):
        left, right = (A.view(m, n, m, n).permute(0, 2, 1, 3).reshape(m * m, n * n) for A in (Z, R))
        # (ac, bd) from sum_ij Z_ij[a, c] R_ij[b, d], to (ab, cd).
        system += (left.mT @ right).view(n, n, n, n).permute(0, 2, 1, 3).reshape(n * n, n * n)
    rows, columns = torch.tril_indices(n, n, device=short.device)
    lower, upper = rows * n + columns, columns * n + rows
    # Unknowns are the lower triangle of X; entries off the diagonal count twice.
    half = (system[lower] + system[upper]) / 2
    small = (half[:, lower] + half[:, upper]) * torch.where(rows == columns, 0.5, 1.0).to(short)
    x = torch.linalg.solve(small, short.reshape(-1)[lower])
    X = torch.zeros_like(short)
    X[rows, columns] = x
    X[columns, rows] = x
    return X


def _inside(matrices: Tensor, change: Tensor) -> float:
    """How much of a change keeps both matrices positive definite, at most 0.95 of it."""
    length = 1.0
    while torch.linalg.cholesky_ex(matrices + length * change).info.any():
        length *= 0.8
    return 0.95 * length


def _feasible(multipliers: Tensor, m: int, n: int) -> Tensor:
    """Positive (2, N, N), scaled from both sides so that their partial traces add up to I."""
    values, vectors = torch.linalg.eigh(_partial_trace(multipliers.sum(0), m, n))
    scale = (vectors * values.rsqrt()) @ vectors.mT
    blocks = multipliers.view(2, m, n, m, n).permute(0, 1, 3, 2, 4)
    return (scale @ blocks @ scale).permute(0, 1, 3, 2, 4).reshape(multipliers.shape)


def _scale_that_bounds(weights: Tensor, H: Tensor, m: int) -> Tensor:
    """The least c with -c I (x) Lambda <= H <= c I (x) Lambda."""
    values, vectors = torch.linalg.eigh(weights)
    root = _kron((vectors * values.rsqrt()) @ vectors.mT, m)
    return torch.linalg.eigvalsh(root @ H @ root).abs().max()


def _kron(weights: Tensor, m: int) -> Tensor:
    return torch.kron(torch.eye(m).to(weights), weights)


def _partial_trace(matrix: Tensor, m: int, n: int) -> Tensor:
    """The sum of the diagonal blocks (n, n) of (m n, m n)."""
    return torch.einsum("iaib->ab", matrix.view(m, n, m, n))
