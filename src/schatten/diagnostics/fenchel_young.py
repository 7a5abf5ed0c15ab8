"""Fenchel-Young: what decoupled decay makes a rule solve, and how far a weight and a signal are from fitting each other.

With decay lambda and factor c a rule on the map K minimises F(W) + (1/lambda) (cK)*(lambda W), (cK)*(Y) = c K*(Y / c), and is
at rest where lambda W = -c grad K(S). The residual c K(S) + (cK)*(lambda W) + <lambda W, S> is 0 there and positive elsewhere.
With the gradient for S it is the score of stationarity, with the momentum the part of the Lyapunov function beside the loss.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from schatten.diagnostics.core import Block
from schatten.diagnostics.nuclear_norm import nuclear_norm
from schatten.maps import L1, Map, Nuclear, Scaled, Sum
from schatten.maps.lifts import magnitudes
from schatten.maps.potential import Potential
from schatten.metrics import spectral_norm
from schatten.retractions import DecoupledDecay
from schatten.scales import RMS
from schatten.signals import ErrorFeedback, Gradient, Momentum, Signal, TwoBeta, VarianceReduced
from schatten.solvers import Solver, polynomial

# Beyond its domain K* counts at a multiple of the point this much short of the boundary, where a log barrier is still finite.
SHORT = 1e-12

# The polar factor for ||S||_nuc: eight quintics, within 0.1 % on singular values from 1e-4 of the Frobenius norm on. A
# residual is what is left of terms that cancel, and gradients have many small singular values: finer than a ratio needs.
CHEAP = polynomial(tol=1e-3, lower=1e-4, dtype="float32")


class Implied(NamedTuple):
    """The problem min F + (1/weight_decay) (factor map)*(weight_decay W) that a rule solves in one block."""

    map: Map
    weight_decay: float
    factor: float
    form: Literal["explicit", "implicit"]


class FenchelYoung(NamedTuple):
    """Of matrices (*b, m, n), fp64 tensors (*b): the residual, its parts c K(S) and c K*(lambda W / c), and the violation."""

    residual: Tensor
    value: Tensor
    conjugate: Tensor
    violation: Tensor


def implied(block: Block) -> Implied | None:
    """What decoupled decay makes the rule of `block` solve; None where no K says so.

    That is where the direction is no gradient of one convex K (a `Direction`, a threshold relative to each signal), decay is
    not `DecoupledDecay`, or a measured scale makes the factor of anything but U V^T depend on the signal.
    """
    rule = block.rule
    if not isinstance(rule.map, Map) or not isinstance(rule.retraction, DecoupledDecay):
        return None
    map, factor = unscaled(rule.map, block.factor)
    if isinstance(rule.scale, RMS) and not isinstance(map, Nuclear):
        return None
    if any(getattr(part, "relative", None) is not None for part in (map.maps if isinstance(map, Sum) else (map,))):
        return None
    return Implied(map, float(block.group["weight_decay"]), factor, rule.retraction.form)


def settled(signal: Signal, group: Mapping[str, Any]) -> float | None:
    """What multiple of a constant gradient a signal tends to, which K sees at rest; None where it is no multiple of it."""
    if isinstance(signal, Momentum) and signal.form == "sum":
        return 1 / (1 - group["momentum"])
    return 1.0 if isinstance(signal, (ErrorFeedback, Gradient, Momentum, TwoBeta, VarianceReduced)) else None


def unscaled(map: Map, factor: float = 1.0) -> tuple[Map, float]:
    """A map without its multiples, and `factor` times them: factor (c K) = (factor c) K."""
    while isinstance(map, Scaled):
        map, factor = map.map, factor * map.c
    return map, factor


def fenchel_young(
    map: Map, weight: Tensor, signal: Tensor, weight_decay: float, factor: float = 1.0, *, solver: Solver | None = None
) -> FenchelYoung:
    """c K(S) + c K*(lambda W / c) + <lambda W, S> of weights W and signals S, (*b, m, n) -> (*b) in fp64.

    The signal is the library's: an average of gradients, which a step subtracts; papers that average the negative gradient
    have -<lambda W, S>. K is even. Where lambda W / c is outside the domain of K*, K* counts at the largest multiple
    t lambda W / c, t < 1, inside, so that the residual is finite (of a `Sum` of maps it is infinite), and `violation` says
    how far outside. For a norm K, K* counts 0.

    With `solver` the nuclear norm's K(S) is <S, polar factor of S> and its violation found by power iteration, from
    below; other K take no notice of it. If the solver takes every singular value into [1 - delta, 1 + delta], the residual is
    off by at most delta c ||S||_nuc. `polynomial(tol=delta, lower=l)` does so for singular values of at least l ||S||_F and
    takes smaller ones into [0, 1 + delta], so each of those adds at most c l ||S||_F to the error.

    Cost otherwise: one SVD in fp64 of W and one of S, for a spectral K.
    """
    map, factor = unscaled(map, factor)
    W, S = weight.double(), signal.double()
    if isinstance(map, Nuclear) and solver is not None:
        K, conjugate = nuclear_norm(signal, solver=solver), W.new_zeros(W.shape[:-2])
        violation = (spectral_norm(weight).double() * (weight_decay / factor) - 1).clamp(min=0)
    else:
        K, (conjugate, violation) = map.value(S), _finite_conjugate(map, W * (weight_decay / factor))
    residual = factor * (K + conjugate) + weight_decay * (W * S).sum((-2, -1))
    return FenchelYoung(residual, factor * K, factor * conjugate, violation)


def _finite_conjugate(map: Map, Y: Tensor) -> tuple[Tensor, Tensor]:
    """K*(Y), outside its domain at the largest multiple of Y inside, and how far outside Y is; one SVD for a spectral K."""
    if isinstance(map, Sum):
        return map.conjugate(Y), map.violation(Y)
    if isinstance(map, Nuclear):
        map, Y = L1(), magnitudes(Y, "spectrum").unsqueeze(-2)
    elif isinstance(map, Potential):
        # A potential of magnitudes is the same potential of them as entries, which saves more SVDs.
        map, Y = replace(map, over="entries"), magnitudes(Y, map.over).unsqueeze(-2)
    violation = map.violation(Y)
    outside = violation > 0
    # Domains are balls {gauge <= radius} with violation gauge - radius beyond, which twice the point tells apart.
    gauge = map.violation(2 * Y) - violation
    share = torch.where(outside, (gauge - violation) / torch.where(outside, gauge, 1) * (1 - SHORT), 1)
    return map.conjugate(share[..., None, None] * Y), violation
