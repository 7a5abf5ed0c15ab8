"""Broken potentials: each mistake in a map beyond Muon's is caught by the law named beside it."""

from dataclasses import dataclass

import pytest
import torch

from schatten import maps, solvers
from schatten.maps import Clip, Huber, KyFan, LogCosh, Ordered, Power, Scaled, Schatten, SoftThreshold, Sum
from tests.contracts import map_laws as laws

DIAGONAL = {"solver": solvers.svd()}


@dataclass(frozen=True)
class WrongExponent(Power):
    def k_star(self, u, a):
        return u.pow(1 + self.p).sum(-1) / (1 + self.p)


@dataclass(frozen=True)
class WrongRadius(Clip):
    def excess(self, u, a):
        return u.amax(-1) - 1


@dataclass(frozen=True)
class WrongFactor(Huber):
    def k_star(self, u, a):
        return a * u.square().sum(-1)


@dataclass(frozen=True)
class DroppedHalfOfTheDualBall(KyFan):
    def excess(self, u, a):
        return u.sum(-1) / self.count - 1


@dataclass(frozen=True)
class DroppedU(LogCosh):
    def grad(self, S):
        s, Vh = torch.linalg.svd(S, full_matrices=False)[1:]
        return torch.eye(S.shape[-2], s.shape[-1], dtype=S.dtype) @ (self.h(s, self.a).unsqueeze(-1) * Vh)


@dataclass(frozen=True)
class ConjugateWithoutTheNuclearNorm(SoftThreshold):
    def k_star(self, u, a):
        return u.square().sum(-1) / 2


@dataclass(frozen=True)
class SameExponentInsteadOfTheDual(Schatten):
    def excess(self, u, a):
        return torch.linalg.vector_norm(u, ord=self.p, dim=-1) - 1


@dataclass(frozen=True)
class WeightsInAscendingOrder(Ordered):
    def k(self, s, a):
        return (s.sort(dim=-1).values * self._padded(s)).sum(-1)


@dataclass(frozen=True)
class ThresholdTakenForItsSquare(Huber):
    def h(self, s, a):
        return (s / a**2).clamp(max=1)


@dataclass(frozen=True)
class RowsForColumns(Huber):
    def grad(self, S):
        return super().grad(S.mT).mT


@dataclass(frozen=True)
class ConjugateNotRescaled(Scaled):
    def conjugate(self, X):
        return self.c * self.map.conjugate(X)


@dataclass(frozen=True)
class ConjugateAddedUp(Sum):
    def conjugate(self, X):
        return torch.stack([K.conjugate(X) for K in self.maps]).sum(0)


huber = Huber(0.3, **DIAGONAL)
MISTAKES = [
    (WrongExponent(0.25, **DIAGONAL), laws.fenchel_young_holds_with_equality_at_the_gradient),
    (WrongRadius(0.3, **DIAGONAL), laws.conjugate_is_the_supremum),
    (WrongFactor(0.3, **DIAGONAL), laws.fenchel_young_holds_with_equality_at_the_gradient),
    (DroppedHalfOfTheDualBall(2, **DIAGONAL), laws.conjugate_is_the_supremum),
    (DroppedU(0.3, **DIAGONAL), laws.gradient_is_the_derivative_of_the_value),
    (DroppedU(0.3, **DIAGONAL), laws.rotations_change_nothing),
    (ConjugateWithoutTheNuclearNorm(0.3, **DIAGONAL), laws.fenchel_young_holds_with_equality_at_the_gradient),
    (SameExponentInsteadOfTheDual(1.5, **DIAGONAL), laws.conjugate_is_the_supremum),
    (WeightsInAscendingOrder((2.0, 1.0), **DIAGONAL), laws.value_is_convex),
    (WeightsInAscendingOrder((2.0, 1.0), **DIAGONAL), laws.gradient_is_the_derivative_of_the_value),
    (ThresholdTakenForItsSquare(1.1, **DIAGONAL), laws.gradient_is_the_derivative_of_the_value),
    (RowsForColumns(1.1, over="rows", **DIAGONAL), laws.gradient_is_the_derivative_of_the_value),
    (ConjugateNotRescaled(huber, 0.5), laws.fenchel_young_holds_with_equality_at_the_gradient),
    (ConjugateAddedUp((huber, 0.5 * maps.Frobenius())), laws.fenchel_young_holds_with_equality_at_the_gradient),
]


@pytest.mark.parametrize(("K", "law"), [pytest.param(K, law, id=f"{type(K).__name__}-{law.__name__}") for K, law in MISTAKES])
def test_the_mistake_is_caught_by_the_law(K, law):
    with pytest.raises(AssertionError):
        law(K)


@pytest.mark.parametrize(
    "law", sorted({law for _, law in MISTAKES}, key=lambda law: law.__name__), ids=lambda law: law.__name__
)
@pytest.mark.parametrize(
    "cls",
    sorted({type(K).__mro__[1] for K, _ in MISTAKES} - {Scaled, Sum}, key=lambda cls: cls.__name__),
    ids=lambda cls: cls.__name__,
)
def test_the_map_without_the_mistake_is_not_accused(cls, law):
    law(laws.exact(cls, *laws.ARGUMENTS[cls.__name__][0]))
