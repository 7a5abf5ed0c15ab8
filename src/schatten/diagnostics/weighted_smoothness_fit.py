"""Lambda-smoothness of large blocks: a Lambda with -I (x) Lambda <= H <= I (x) Lambda from products, with a stated risk.

The shape of Lambda is the root of sum_i (H^2)_ii over rows i, which is |Q| for H = P (x) Q. Its size is the largest eigenvalue
of Lambda^-1/2 H Lambda^-1/2, by Lanczos, raised by what Lanczos may have missed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Need
from schatten.diagnostics.deflation import eigenvectors, look, rest_of_probe, tridiagonal
from schatten.diagnostics.lanczos import lanczos, shortfall
from schatten.diagnostics.weighted_smoothness import Side, WeightedSmoothness

# Directions in which H shows nothing still get this share of Lambda's root mean square: less would let the estimate's errors
# there decide the scale, more would raise the trace for nothing.
FLOOR = 0.01


def fit_weighted_smoothness(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    side: Side = "right",
    steps: int = 30,
    probes: int = 16,
    ascents: int = 5,
    failure: float = 0.05,
    seed: int = 0,
) -> WeightedSmoothness:
    """A Lambda that bounds H with probability 1 - `failure` over random starts, from products; not the least one.

    Its trace was within 30 % of the least one for blocks of small networks (tests/reference/test_weighted_smoothness.py).
    `least` is the largest nuc(H D) with D of spectral norm 1 that an ascent D <- msgn(H D) found: at most L_* and so at most
    any Lambda's trace. `margin` is found by Lanczos, so it is an upper bound. Several matrices get a Lambda each, which bound
    all of H together.

    Cost: 2 steps + 1 + probes + ascents Hessian-vector products, and ascents SVDs. Memory: about 3 steps vectors of `like`.

    Args:
        product: H v, symmetric, from a tensor of `like`'s shape to one.
        like: (*b, m, n), for shape, precision and device.
        side: "right" is the paper's, tr(A Lambda A^T) with Lambda (n, n); "left" is tr(A^T Lambda A) with Lambda (m, m).
        steps: of Lanczos, once to see H and once for the scale.
        probes: for what the first run has not seen, at least 1.
        ascents: for `least`.
        failure: the chance, over Lanczos's random starts, that the bound does not hold (`lanczos.shortfall`).
        seed: of starts and probes, drawn on the CPU, the same on every device.

    Raises ValueError for fewer than two dimensions, no step, probe or ascent, another side, and too few steps for
    `failure`.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.weighted_smoothness_fit import fit_weighted_smoothness
        >>> Q = torch.tensor([[2.0, 1.0], [1.0, -3.0]]).double()
        >>> fit = fit_weighted_smoothness(lambda V: V @ Q, torch.zeros(6, 2).double())
        >>> nuclear = torch.linalg.matrix_norm(Q, "nuc")
        >>> bool((fit.L_star / nuclear - 1).abs() < 0.1), bool(fit.least <= 1.001 * nuclear)
        (True, True)
    """
    if like.ndim < 2 or side not in ("right", "left"):
        raise ValueError(
            f'like must be matrices (*b, m, n) and side "right" or "left", got shape {tuple(like.shape)}, {side!r}.'
        )
    if min(steps, probes, ascents) < 1:
        raise ValueError(f"steps, probes and ascents must be at least 1, got {steps=}, {probes=}, {ascents=}.")
    missed = shortfall(like.numel(), steps, failure)
    if missed == math.inf:
        raise ValueError(
            f"{steps=} are too few to bound a Hessian of {like.numel()} entries but for a chance of {failure=}: take more, or "
            f"a larger chance."
        )
    if side == "left":
        return fit_weighted_smoothness(
            lambda V: product(V.mT).mT,
            like.mT,
            steps=steps,
            probes=probes,
            ascents=ascents,
            failure=failure,
            seed=seed,
        )
    generator = torch.Generator().manual_seed(seed)
    run = look(product, like, steps, generator)
    # H times the basis is in T, but for the last vector.
    images = tridiagonal(run.ritz, len(run.basis)).to(run.basis) @ run.basis
    images[-1] = product(run.basis[-1].view(like.shape)).detach().reshape(-1)
    square = torch.stack([_gram(image.view(like.shape)) for image in images]).sum(0)
    everything = torch.ones_like(run.ritz.values, dtype=torch.bool)
    for _ in range(probes):
        _, rest = rest_of_probe(run.basis, everything, generator)
        square = square + _gram(product(rest.view(like.shape))) / probes
    values, vectors = eigenvectors(square)
    mean = values.mean(-1, keepdim=True).clamp(min=0)
    floor = FLOOR**2 * (mean + FLOOR * mean.mean())
    values = torch.where(floor > 0, (values.clamp(min=0) + floor).sqrt(), 1.0)
    root = ((vectors * values.rsqrt()[..., None, :]) @ vectors.mT).to(run.basis)
    # A start of its own: `shortfall` counts on one that Lambda does not depend on.
    start = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(root)
    top = lanczos(lambda V: product(V @ root) @ root, start, steps, start=start).values.abs().amax()
    weights = top * missed * (vectors * values[..., None, :]) @ vectors.mT
    # An index of its own dimension: a number would be read by the host.
    largest = run.ritz.values.abs().argmax(keepdim=True)
    D = run.vectors().index_select(0, largest).view(like.shape)
    least = top.new_zeros(())
    for _ in range(ascents):
        HD = product(D).detach().double()
        # Of NaN the SVD may raise; `least` gets it below.
        U, S, Vh = torch.linalg.svd(torch.where(HD.isfinite().all(), HD, 0.0), full_matrices=False)
        D = (U @ Vh).to(D)
        least = torch.maximum(least, S.sum())
    nan = torch.where(top.isfinite(), 0.0, torch.nan)
    rank = like.shape[:-2].numel() * min(like.shape[-2:])
    return WeightedSmoothness(weights + nan, least + nan, 1 - 1 / missed + nan, rank)


@dataclass(frozen=True)
class WeightedSmoothnessOfMatrix:
    """`fit_weighted_smoothness` for `Monitor`: the matrices of a parameter get a Lambda each and are counted together."""

    name: ClassVar[str] = "weighted_smoothness"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    columns: ClassVar[Mapping[str, str]] = {
        "L": "||Lambda||_op for -I (x) Lambda <= H <= I (x) Lambda, a bound of Frobenius smoothness, loss / weight^2",
        "L_star": "||Lambda||_*, an upper bound of spectral smoothness, loss for a step of spectral norm 1",
        "least": "a lower bound of spectral smoothness and of every ||Lambda||_*, loss for a step of spectral norm 1",
        "ratio": "L_star / (r L), the smaller, the more Muon's bound gains on gradient descent's",
    }
    cost: ClassVar[str] = "2 steps + 1 + probes + ascents Hessian-vector products, ascents SVDs"

    side: Side = "right"
    steps: int = 30
    probes: int = 16
    ascents: int = 5
    seed: int = 0

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.hessian is not None
        fit = fit_weighted_smoothness(
            of.hessian,
            of.weight,
            side=self.side,
            steps=self.steps,
            probes=self.probes,
            ascents=self.ascents,
            seed=self.seed,
        )
        return {"L": fit.L, "L_star": fit.L_star, "least": fit.least, "ratio": fit.ratio}


QUANTITY = WeightedSmoothnessOfMatrix


def _gram(Y: Tensor) -> Tensor:
    Y = Y.detach().double()
    return Y.mT @ Y
