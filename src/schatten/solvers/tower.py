"""The tower: every spectral function U h(Sigma) V^T as a weighted sum of the same few iterates.

Quintics q_1, ..., q_7 applied in turn to X_0 = S / s give X_1, ..., X_7 with the singular vectors of S. Their scalar maps
grow slowly and differ, so that sum_k w_k X_k fits any smooth h to 2 % on singular values in [1e-3, 1] of the largest; the
weights come from a linear programme (`schatten.solvers.fit`). Three choices keep one short tower good for all:

- s is the spectral norm, nearly (`spectral_norm`), not the Frobenius norm, under which a wide spectrum would slide out of
  the fitted range.
- A function with a threshold a depends on a / s, which differs between matrices: its weights are interpolated in log(a/s)
  in a table of fits, on the device.
- Where a exceeds 0.025 s, s = a / 0.025 is taken instead: the same function of a smaller argument, in which it is linear.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from schatten import kernels
from schatten.solvers.core import (
    ALL,
    Columns,
    SpectralFunction,
    check_matrices,
    dtype_name,
    on_wide_batch,
    working_dtype,
)
from schatten.solvers.fit import Fit, Quintic, fit_many, grid, scalar_iterates, weights_for
from schatten.solvers.iteration import cheaper_form
from schatten.solvers.power_function import PowerFunction
from schatten.solvers.spectral_norm import SAFETY, spectral_norm_from_gram

# Fitted together by `scripts/fit_tower.py`: the worst of 27 powers, pseudo-Huber functions, hyperbolic tangents and
# s/(s + a) with thresholds from 4e-4 to 0.025 is 1.9 % on [9.7e-4, 1]; no iterate exceeds 1.36 up to 1.
SMOOTH: tuple[Quintic, ...] = (
    (3.638061, -6.293033, 3.084074),
    (3.780353, -5.347523, 2.230855),
    (2.483204, -2.304112, 0.684656),
    (2.636883, -2.879895, 1.023475),
    (2.574060, -2.954055, 1.100790),
    (2.145207, -2.754629, 1.131001),
    (1.611345, -2.620305, 1.780220),
)

# `scripts/fit_tower.py --steps 8 --family inverse`: powers from -0.9 to 0, 1.73 % on [9.5e-4, 1].
INVERSE: tuple[Quintic, ...] = (
    (3.173361, -3.815425, 1.621753),
    (2.402183, -1.914748, 0.540830),
    (2.706142, -2.545259, 0.845397),
    (2.596196, -2.322268, 0.729565),
    (2.820893, -2.616161, 0.847171),
    (2.515092, -2.128498, 0.614413),
    (2.142881, -1.850641, 0.583925),
    (2.933412, -2.967349, 1.441703),
)

TOWERS = {7: SMOOTH, 8: INVERSE}

# sigma >= 1e-3 of the largest, after division by at most SAFETY times the largest.
LOWER = 1e-3 / SAFETY - 1e-6

# sum |w| times the unit roundoff of the iterates is an error on the scale of h(1); beyond 3 % a precision is refused.
AMPLIFIED = 0.03
HOLDS = {"bfloat16": AMPLIFIED * 2**9, "float16": AMPLIFIED * 2**11, "float32": AMPLIFIED * 2**24, "float64": AMPLIFIED * 2**53}

# A fit worse than this is none; kinks (clip, Huber) stay below it, jumps do not.
WORST = 0.15

TOP = 0.025  # the largest a / s in a table of relative errors
BOTTOM = 1e-6  # below it a bounded function with this threshold is the polar factor, to 0.1 % at s = 1e-3
NODES_PER_DECADE = 24


def fit(
    h: Callable[[Tensor], Tensor],
    lower: float = LOWER,
    steps: int = 7,
    *,
    error: str = "relative",
    dtype: torch.dtype | str = "float32",
) -> Fit:
    """Weights with which the tower's iterates best approximate `h`, by one linear programme, cached by its arguments.

    Args:
        h: a non-negative function of singular values in [0, 1], on fp64 tensors.
        lower: where the fit starts; nothing is promised below but the sign.
        steps: 7, the tower of smooth non-decreasing functions, or 8, that of negative powers.
        error: `"relative"` to h, or `"absolute"` for an h that vanishes.
        dtype: the precision the iterates will have.

    Returns the weights w_0..w_n, the largest error on [lower, 1], and sum |w|, by which rounding of the iterates enters.
    Raises ValueError if sum |w| would ruin `dtype`; the message names the precision that holds it.

    Example:
        >>> import schatten
        >>> f = schatten.solvers.fit(lambda s: s.sqrt())
        >>> f.error < 0.02, f.amplification < 1.2
        (True, True)
    """
    if steps not in TOWERS:
        raise ValueError(f"steps must be one of {sorted(TOWERS)}, the lengths of the towers, got {steps!r}.")
    if not 0 < lower < 1:
        raise ValueError(f"lower must lie in (0, 1), got {lower}.")
    if error not in ("relative", "absolute"):
        raise ValueError(f"error must be 'relative' or 'absolute', got {error!r}.")
    result = weights_for(h, lower, TOWERS[steps], error)
    check_amplification(result.amplification, dtype_name(dtype))
    return result


def check_amplification(amplification: float, dtype: str) -> None:
    """Refuse weights whose sum |w| the precision cannot hold."""
    if amplification > HOLDS.get(dtype, math.inf):
        holds = next(name for name in ("float16", "float32", "float64") if amplification <= HOLDS[name])
        raise ValueError(
            f"dtype {dtype} cannot hold this fit: its weights have sum|w| = {amplification:.3g}, by which the rounding of the "
            f"iterates is amplified; {dtype} holds up to {HOLDS[dtype]:.3g}. Use dtype='{holds}'."
        )


@lru_cache(maxsize=256)
def _on_device(values: tuple[float, ...] | tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Constants as a tensor, copied once: a copy in every step would make the device wait."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Table:
    """Weights of h(x, rho) / h(1, rho), or of h(x, rho) if absolute, at log-spaced rho; `error` is the worst, also between."""

    weights: tuple[tuple[float, ...], ...]
    low: float
    high: float
    error: float
    amplification: float

    def at(self, rho: Tensor) -> Tensor:
        """(b,) -> (b, n + 1), linear in log rho: a mean of two fits, whose errors bound its own."""
        rows = _on_device(self.weights, rho.dtype, rho.device)
        last = len(rows) - 1
        place = (rho.log() - math.log(self.low)) * (last / math.log(self.high / self.low))
        place = place.clamp(0, last).nan_to_num(0)
        index = place.floor().clamp(max=last - 1).long()
        return torch.lerp(rows[index], rows[index + 1], (place - index).unsqueeze(-1))


@lru_cache(maxsize=64)
def table(family: SpectralFunction) -> _Table:
    """The fits of a function with a threshold, for every a / s that needs its own."""
    absolute = family.vanishes
    low, high = BOTTOM, 1.0 if absolute else TOP
    nodes = grid(low, high, 1 + round(NODES_PER_DECADE * math.log10(high / low)))
    x = grid(LOWER, 1.0, 300)
    error = "absolute" if absolute else "relative"

    def values(x: Tensor, rho: Tensor) -> Tensor:
        H = family.h(x.expand(len(rho), -1), rho.unsqueeze(-1)).T
        return H if absolute else H / family.h(torch.ones_like(rho).unsqueeze(-1), rho.unsqueeze(-1)).T

    W, E = fit_many(values(x, nodes), LOWER, SMOOTH, error=error, points=len(x))
    if not absolute:
        # At a = TOP s the argument may be any smaller part of s: that row is fitted down to 0, nearly.
        far = grid(LOWER / 100, 1.0, 300)
        W[-1:], E[-1:] = fit_many(values(far, nodes[-1:]), LOWER / 100, SMOOTH, error=error, points=300)
    middle = (nodes[1:] * nodes[:-1]).sqrt()
    H = values(x, middle)
    between = ((W[1:] + W[:-1]) / 2 @ scalar_iterates(SMOOTH, x)).T
    between_error = (between - H).abs() if absolute else (between / H - 1).abs()
    return _Table(
        tuple(tuple(row) for row in W.tolist()),
        low,
        high,
        max(float(E.max()), float(between_error.max())),
        float(W.abs().sum(-1).max()),
    )


def _quintics(f: SpectralFunction) -> tuple[Quintic, ...]:
    return INVERSE if f.family is None and f.degree <= 0 else SMOOTH


@lru_cache(maxsize=256)
def constant(f: SpectralFunction) -> Fit:
    """The fit of a function without a threshold."""
    return weights_for(lambda x: f.h(x, 0.0), LOWER, _quintics(f), "relative")


def _found(f: SpectralFunction) -> Fit | _Table:
    family = f.family
    return constant(f) if family is None else table(family)


@dataclass(frozen=True)
class _Tower:
    dtype: str

    def __call__(self, X: Tensor) -> Tensor:
        return self.apply(X, PowerFunction(0.0))

    def check(self, f: SpectralFunction) -> None:
        """Refuse a function without a good polynomial, and one whose weights the precision cannot hold."""
        if f.rank is not None:
            name = type(f).__name__
            raise ValueError(
                f"tower() cannot compute {name}: it depends on a rank, which no polynomial sees; use krylov() or svd()."
            )
        found = _found(f)
        if found.error > WORST:
            raise ValueError(
                f"tower() cannot compute {type(f).__name__}: its best weights are off by {found.error:.0%}, as of functions "
                f"with a jump and of those flatter than sigma at 0; use svd()."
            )
        check_amplification(found.amplification, self.dtype)

    def apply(self, X: Tensor, f: SpectralFunction) -> Tensor:
        check_matrices(X, "X")
        return on_wide_batch(X, lambda Y: self.apply_to_columns(Y, f))

    def apply_to_columns(self, X: Tensor, f: SpectralFunction, columns: Columns = ALL) -> Tensor:
        work = working_dtype(X, self.dtype)
        found = _found(f)
        if self.dtype == "auto" and found.amplification > HOLDS[str(work).removeprefix("torch.")]:
            work = torch.float32
        return _apply(X, f, found, work, columns)

    def __repr__(self) -> str:
        return f"tower(dtype={self.dtype!r})"


def _apply(X: Tensor, f: SpectralFunction, found: Fit | _Table, work: torch.dtype, columns: Columns) -> Tensor:
    norm = columns.frobenius(X)
    A = columns.gram(kernels.quotient(X, norm, work))
    top = spectral_norm_from_gram(A)
    top = torch.where(top == 0, 1, top)
    scale = SAFETY * top  # of X / norm
    if isinstance(found, Fit):
        weights = _on_device(found.weights, scale.dtype, X.device)[:, None, None, None]
    else:
        # In units of the Frobenius norm, which every finite matrix has within range.
        threshold = f.a * (
            top if f.relative == "spectral" else torch.ones_like(norm) if f.relative == "frobenius" else 1 / norm
        )
        if not f.vanishes:
            scale = torch.maximum(scale, threshold / TOP)
        rho = threshold / scale
        weights = found.at(rho.reshape(-1)).T[:, :, None, None]
        if not f.vanishes:
            weights = weights * f.h(torch.ones_like(rho), rho)
    if f.degree != 0:
        weights = weights * (scale * norm).pow(f.degree)
    # In fp32, as 1 / scale^2 rounded to half precision would put A beside X X^T as a whole.
    A = (A / scale.square()).to(work)
    form = cheaper_form(X.shape[-2], columns.count(X), _quintics(f), work, summed=True, half=kernels.halves(X, work))
    return form(kernels.quotient(X, scale * norm, work), _quintics(f), list(weights), A, columns)


def tower(*, dtype: torch.dtype | str = "auto") -> _Tower:
    """Any smooth spectral function U h(Sigma) V^T by seven quintics, to 2 % on [1e-3, 1] of the largest singular value.

    Powers with p >= 0, tanh, pseudo-Huber and s/(s + a) with any threshold are within 2 % of h(sigma) for fp32 products.
    Functions with a kink are off near it, clip and Huber by up to 10 % of their value and a soft threshold by up to 1 % of
    the largest singular value for a below 0.1 of it and 7 % beyond; those with a jump are refused. Below 1e-3 the
    result tends to 0 in proportion to sigma. bf16 and fp16 products add their rounding (`docs/accuracy.md` has the
    table): about 1 % of the largest output, which counts most for small singular values.

    `dtype` is the precision of the products, `"auto"` the fastest of the device that the weights can be held in. Called
    as a solver it gives the polar factor, for which `polynomial()` is cheaper.

    Example:
        >>> import torch, schatten
        >>> S = torch.diag(torch.tensor([1.0, 0.01]))
        >>> D = schatten.solvers.tower(dtype="float32").apply(S, schatten.maps.Power(0.5))
        >>> bool(((D.diagonal() / S.diagonal().sqrt() - 1).abs() < 0.02).all())
        True
    """
    return _Tower(dtype_name(dtype))
