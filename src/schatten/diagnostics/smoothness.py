"""Spectral smoothness: how much a gradient changes, in the nuclear norm, when weights move by 1 in the spectral norm.

L_* is the smallest number with nuc(grad f(W) - grad f(W')) <= L_* op(W - W'), which replaces r L in Muon's convergence bounds
(Shen et al. 2025, arXiv 2505.23737, assumption 3.2). Near W it is the norm of the Hessian from op to nuc, the largest <E, H D>
over op(D), op(E) <= 1. To find that is hard; it lies between what ascent finds and r L.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Estimate, Need
from schatten.diagnostics.lanczos import largest_eigenvalue, shortfall
from schatten.polar import polar

STEPS, STARTS, ITERATIONS = 10, 2, 20


class Smoothness(NamedTuple):
    """L <= lower <= L_* <= upper, numbers, in units of the loss for a step of spectral norm 1.

    Attributes:
        lower: the largest <E, H D> that was found, for D and E of spectral norm at most 1.
        upper: r L, r the number of singular values of all blocks, with L raised by `shortfall`: it fails for at most 5 % of
            Lanczos's starts.
        L: the largest |eigenvalue| of H from below, and its residual bound.
        rank: r.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.smoothness import spectral_smoothness
        >>> S = spectral_smoothness(lambda D: 2 * D, torch.empty(3, 5, dtype=torch.float64))
        >>> S.rank, round(float(S.lower), 4), round(float(S.upper), 4), round(float(S.gain), 4)
        (3, 6.0, 6.0, 1.0)
    """

    lower: Tensor
    upper: Tensor
    L: Estimate
    rank: int

    @property
    def gain(self) -> Tensor:
        """r L / lower, from 1 to r: at most what spectral smoothness takes off Muon's bound under Frobenius smoothness."""
        return self.rank * self.L.value / self.lower


def ascend(product: Callable[[Tensor], Tensor], start: Tensor, steps: int = STEPS) -> Tensor:
    """<E, H D> after each of `steps` steps E, D <- msgn(H D), E: lower bounds of L_*, (steps), at a product each.

    `start` is D, (*b, m, n), of any length. E is the best for its D, and as H is symmetric D is at least as good for E: the
    values never fall, up to the accuracy of msgn (`schatten.polar`, tol 1e-3, 1e-8 for fp64), whose excess they are divided by.
    Several blocks count together: the largest of their spectral norms, the sum of their nuclear norms. The ascent ends in a
    local maximum.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.smoothness import ascend
        >>> Q = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> values = ascend(lambda D: D * Q, torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64), steps=3)
        >>> round(float(values[-1]), 4)
        4.0
    """
    D, tol = _msgn(start)
    values = []
    for _ in range(steps):
        HD = product(D)
        E, _ = _msgn(HD)
        values.append((E.double() * HD.double()).sum() / (1 + tol) ** 2)
        D = E
    return torch.stack(values)


def spectral_smoothness(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    *,
    start: Tensor | None = None,
    steps: int = STEPS,
    starts: int = STARTS,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> Smoothness:
    """Bounds of L_* from the Hessian at one point, for blocks of `like`'s shape (*b, m, n).

    Lower: `ascend` from `starts` Gaussian matrices, and from `start`, such as the gradient, if given. Upper: r L, as
    nuc(H D) <= sqrt(r) ||H D||_F <= sqrt(r) L ||D||_F <= r L op(D), with Lanczos's L. For D -> P D Q, P and Q positive with
    eigenvalues p, q falling, L_* is sum_i p_i q_i over the shorter side (op(P) nuc(Q) is above it); on 100 such products the
    defaults came within 10 % of it. Between two points L_* of the loss may be larger than at both.

    Cost: iterations + steps (starts + 1, with `start`) Hessian-vector products, and as many polar factors as steps.

    Raises ValueError for fewer than two dimensions and where there is nothing to ascend from.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.smoothness import spectral_smoothness
        >>> Q = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> S = spectral_smoothness(lambda D: D * Q, torch.empty(2, 2, dtype=torch.float64))
        >>> round(float(S.L.value), 4), round(float(S.lower), 4), round(float(S.upper), 4)
        (3.0, 4.0, 6.0)
    """
    if like.ndim < 2:
        raise ValueError(f"like must be matrices (*b, m, n), got shape {tuple(like.shape)}.")
    if steps < 1 or starts + (start is not None) < 1:
        raise ValueError(f"spectral_smoothness ascends by steps >= 1 from starts >= 1 or a start, got {steps=}, {starts=}.")
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    points = [torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, dtype) for _ in range(starts)]
    if start is not None:
        points.append(start.detach().to(dtype))
    lower = torch.stack([ascend(product, point, steps)[-1] for point in points]).amax()
    L = largest_eigenvalue(product, like, iterations, seed=seed)
    rank = like.shape[:-2].numel() * min(like.shape[-2:])
    # The top eigenvector is a direction too: L_* >= L, as nuc >= fro >= op.
    return Smoothness(torch.maximum(lower, L.value), rank * shortfall(like.numel(), iterations) * L.value, L, rank)


@dataclass(frozen=True)
class SmoothnessOfMatrix:
    """`spectral_smoothness` for `Monitor`, equal blocks of a parameter together, from the gradient and Gaussian starts.

    Example:
        >>> import torch, schatten
        >>> from schatten.diagnostics.core import Block
        >>> from schatten.diagnostics.smoothness import SmoothnessOfMatrix
        >>> G = torch.eye(3)[None]
        >>> block = Block("w", schatten.Rule(), {}, weight=G, gradient=G, hessian=lambda V: 2 * V)
        >>> round(float(SmoothnessOfMatrix()(block)["upper"]), 2)
        6.0
    """

    name: ClassVar[str] = "smoothness"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"gradient", "hessian"})
    columns: ClassVar[Mapping[str, str]] = {
        "lower": "lower bound of spectral smoothness L_*, loss for a step of spectral norm 1",
        "upper": "upper bound r L, which fails for at most 5 % of Lanczos's starts, loss for a step of spectral norm 1",
        "L": "largest |eigenvalue| of the Hessian, from below, loss / weight^2",
        "gain": "r L / lower: at most what spectral smoothness takes off Muon's convergence bound, from 1 to r",
    }
    cost: ClassVar[str] = "iterations + steps (starts + 1) Hessian-vector products, steps (starts + 1) polar factors"

    steps: int = STEPS
    starts: int = 1
    iterations: int = ITERATIONS
    seed: int = 0

    def __call__(self, of: Block) -> dict[str, Tensor]:
        assert of.gradient is not None and of.hessian is not None
        S = spectral_smoothness(
            of.hessian,
            of.gradient,
            start=of.gradient,
            steps=self.steps,
            starts=self.starts,
            iterations=self.iterations,
            seed=self.seed,
        )
        return {"lower": S.lower, "upper": S.upper, "L": S.L.value, "gain": S.gain}


QUANTITY = SmoothnessOfMatrix


def _msgn(X: Tensor) -> tuple[Tensor, float]:
    """The polar factor in at least fp32, and how much its spectral norm may exceed 1."""
    tol = 1e-8 if X.dtype == torch.float64 else 1e-3
    return polar(X if X.dtype == torch.float64 else X.float(), tol=tol), tol
