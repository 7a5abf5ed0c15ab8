"""Effective rank of a Hessian, ||H||_* / ||H||_op, and its spectral density, by stochastic Lanczos quadrature.

tr f(H) is the mean of z^T f(H) z over random signs z, and k steps of Lanczos from z compute that by Gauss's quadrature: f = |x|
gives the nuclear norm. Hessians of networks have a few large eigenvalues, which make z^T f(H) z vary much. So a first run finds
Ritz vectors y. Those that have converged are counted exactly, and probes see only what is orthogonal to them; of the others,
whose y^T f(H) y is roughly known, each probe's excess (y^T z)^2 - 1, which is 0 on average, is taken off.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Block, Estimate, Need
from schatten.diagnostics.deflation import eigenvectors, look, rest_of_probe, tridiagonal
from schatten.diagnostics.lanczos import Ritz, lanczos
from schatten.diagnostics.probes import mean_of

# Ritz vectors q whose residual r is below this share of their value are counted exactly, as half an eigenvalue at value - r and
# half at value + r: that gives q^T H q and q^T H^2 q as they are, and q^T |H| q, which lies between |value| and
# sqrt(value^2 + r^2), too small by less than 5e-4 of it.
CONVERGED = 0.03


class Spectrum(NamedTuple):
    """What is known of a symmetric H, (N, N), as weighted points of its spectrum; fp64.

    Attributes:
        values: (probes, points), Ritz values.
        masses: (probes, points), how many eigenvalues each stands for, also negative; of one probe they add up to about N.
        coarse_values, coarse_masses: the same from half of the steps, to see what steps are still missing.
        operator: ||H||_op, the largest |Ritz value|, from below; its error is that value's residual bound.
    """

    values: Tensor
    masses: Tensor
    coarse_values: Tensor
    coarse_masses: Tensor
    operator: Estimate

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(H) for a function of eigenvalues; the error holds the spread over probes and the change since half the steps.

        Where f has a kink, quadrature falls short by O(1 / steps), so halving the steps shows the size of the error. For
        polynomials of degree below 2 steps it is exact.
        """
        fine = mean_of((self.masses * f(self.values)).sum(-1))
        coarse = (self.coarse_masses * f(self.coarse_values)).sum(-1).mean(0)
        return Estimate(fine.value, torch.hypot(fine.error, fine.value - coarse))

    @property
    def trace(self) -> Estimate:
        """tr H."""
        return mean_of((self.masses * self.values).sum(-1))

    @property
    def nuclear(self) -> Estimate:
        """||H||_*, the sum of |eigenvalues|."""
        return self.trace_of(torch.abs)

    @property
    def frobenius(self) -> Estimate:
        """||H||_F, the root of the sum of squares, which are skewed: +- 2 of its small errors hold it in some 90 % of draws."""
        square = mean_of((self.masses * self.values.square()).sum(-1))
        value = square.value.clamp(min=0).sqrt()
        return Estimate(value, torch.where(value > 0, square.error / (2 * value), 0.0))

    @property
    def effective_rank(self) -> Estimate:
        """||H||_* / ||H||_op, between 1 and N (arXiv 2505.23737, section 4); 0 for H = 0."""
        top, nuclear = self.operator, self.nuclear
        share = torch.where(top.value > 0, 1 / top.value, 0.0)
        rank = nuclear.value * share
        return Estimate(rank, torch.hypot(nuclear.error * share, rank * top.error * share))

    def density(self, grid: Tensor, width: float | Tensor) -> Estimate:
        """Eigenvalues per unit at each point of a grid (g), smoothed by a Gaussian of standard deviation `width`.

        The integral is N, the number of entries; points and width are in units of the loss over the square of a weight.
        """
        away = (grid.to(self.values)[:, None, None] - self.values) / width
        heights = torch.exp(-away.square() / 2) / (width * (2 * torch.pi) ** 0.5)
        return mean_of((heights * self.masses).sum(-1).mT)


def hessian_spectrum(
    product: Callable[[Any], Any], like: Tensor | Sequence[Tensor], *, probes: int = 8, steps: int = 20, seed: int = 0
) -> Spectrum:
    """Stochastic Lanczos quadrature of a symmetric H (Ubaru, Chen and Saad 2017) behind a deflation of converged eigenvectors.

    Cost: (probes + 1) * steps Hessian-vector products. Memory: about 3 * steps vectors of `like`.

    Args:
        product: H v, from a tensor of `like`'s shape to one, or from a list of tensors to a sequence of them.
        like: a tensor or several, for shapes, precision and device.
        probes: independent random signs, at least 2; an error bar falls as 1 / sqrt(probes).
        steps: of Lanczos per probe; the ends of the spectrum and the kink of |x| at 0 want more.
        seed: of the probes, drawn on the CPU, the same on every device.

    Raises ValueError for fewer than 2 probes and fewer than 2 steps.

    Example:
        >>> import torch
        >>> from schatten.diagnostics.hessian_rank import hessian_spectrum
        >>> d = torch.cat([torch.tensor([5.0, -3.0]), torch.zeros(98)]).double()
        >>> found = hessian_spectrum(lambda v: d * v, d)
        >>> [round(float(x), 6) for x in (found.nuclear.value, found.trace.value, found.operator.value)]
        [8.0, 2.0, 5.0]
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, since one has no error bar, got {probes}.")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, since one step of Lanczos sees one number, got {steps}.")
    generator = torch.Generator().manual_seed(seed)
    run = look(product, like, steps, generator)
    first, vectors = run.ritz, run.vectors()
    del run
    operator = _larger(Estimate(first.values.new_zeros(()), first.values.new_zeros(())), first)
    # A mask and not a choice: the number of converged vectors stays on the device.
    known = first.residuals <= CONVERGED * first.values.abs()
    counted, fine, coarse = [], [], []
    for _ in range(probes):
        z, rest = rest_of_probe(vectors, known, generator)
        square = rest.double().square().sum()
        # Where nothing is left, any start will do, since it counts for nothing.
        ritz = lanczos(product, like, steps, start=torch.where(square > 0, rest, z))
        operator = _larger(operator, ritz)
        counted.append(torch.where(known, 1.0, 1 - (vectors @ rest).double().square()))
        fine.append(_quadrature(ritz, steps, square))
        coarse.append(_quadrature(ritz, steps // 2, square))
    pairs = torch.cat([first.values - first.residuals, first.values + first.residuals]).expand(probes, -1)
    seen = torch.stack([pairs, (torch.stack(counted) / 2).repeat(1, 2)], 1)
    (values, masses), (coarse_values, coarse_masses) = (
        torch.cat([seen, torch.stack(found)], 2).unbind(1) for found in (fine, coarse)
    )
    return Spectrum(values, masses, coarse_values, coarse_masses, operator)


def hessian_rank(
    product: Callable[[Any], Any], like: Tensor | Sequence[Tensor], *, probes: int = 8, steps: int = 20, seed: int = 0
) -> Estimate:
    """The effective rank ||H||_* / ||H||_op of a symmetric H: `hessian_spectrum(...).effective_rank`, with its cost.

    A low effective rank of a layer's Hessian beside a high one of its gradient is where Muon's bounds beat gradient descent's
    (arXiv 2505.23737, section 4).

    Example:
        >>> import torch
        >>> from schatten.diagnostics.hessian_rank import hessian_rank
        >>> d = torch.tensor([4.0, -2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        >>> round(float(hessian_rank(lambda v: d * v, d).value), 6)
        2.0
    """
    return hessian_spectrum(product, like, probes=probes, steps=steps, seed=seed).effective_rank


@dataclass(frozen=True)
class HessianRank:
    """Effective rank, nuclear norm, Frobenius norm and trace of each parameter's diagonal block of the Hessian.

    The logical matrices of one parameter (heads, experts) are taken together, so there is one number for each parameter.
    """

    name: ClassVar[str] = "hessian_rank"
    scope: ClassVar[Literal["matrix", "model"]] = "matrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    columns: ClassVar[Mapping[str, str]] = {
        "rank": "effective rank ||H||_* / ||H||_op of the Hessian in this parameter, 1 to its number of entries",
        "rank_error": "its standard error",
        "nuclear": "||H||_*, the sum of |eigenvalues|, loss / weight^2",
        "nuclear_error": "its standard error",
        "frobenius": "||H||_F, loss / weight^2",
        "frobenius_error": "its standard error",
        "trace": "tr H, loss / weight^2",
        "trace_error": "its standard error",
    }
    cost: ClassVar[str] = "(probes + 1) * steps Hessian-vector products"

    probes: int = 8
    steps: int = 20
    seed: int = 0

    def __call__(self, of: Block) -> Mapping[str, Tensor]:
        assert of.hessian is not None
        found = hessian_spectrum(of.hessian, of.weight, probes=self.probes, steps=self.steps, seed=self.seed)
        numbers = {"rank": found.effective_rank, "nuclear": found.nuclear, "frobenius": found.frobenius, "trace": found.trace}
        return {f"{name}{end}": v for name, e in numbers.items() for end, v in (("", e.value), ("_error", e.error))}


QUANTITY = HessianRank


def _quadrature(ritz: Ritz, steps: int, mass: Tensor) -> Tensor:
    """Gauss's points and weights after some of the steps, for weights that add up to `mass`, (2, points)."""
    if steps >= len(ritz.values):
        return torch.stack([ritz.values, mass * ritz.weights])
    values, vectors = eigenvectors(tridiagonal(ritz, steps))
    return torch.stack([values, mass * vectors[0].square()])


def _larger(operator: Estimate, ritz: Ritz) -> Estimate:
    # take: an index that is a tensor would be read by the host.
    value, at = ritz.values.abs().max(0)
    larger = value > operator.value
    return Estimate(torch.maximum(value, operator.value), torch.where(larger, ritz.residuals.take(at), operator.error))
