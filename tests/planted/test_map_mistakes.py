"""Broken maps: each mistake, one that has been made, is caught by the laws named beside it, so those laws can fail."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from schatten.maps import Nuclear
from schatten.solvers import svd
from tests.contracts import map_laws as laws


@dataclass(frozen=True)
class WrongFactor(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        return 2 * super().grad(S)


@dataclass(frozen=True)
class WrongSign(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        return -super().grad(S)


@dataclass(frozen=True)
class DroppedU(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        Vh = torch.linalg.svd(S)[2]
        return torch.eye(*S.shape[-2:], dtype=S.dtype) @ Vh


@dataclass(frozen=True)
class MissingNormalisation(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        return S / torch.linalg.matrix_norm(S, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class NormOfTheWholeBatch(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        X = S / S.norm().clamp_min(1e-30)
        for _ in range(6):
            X = 1.5 * X - 0.5 * X @ X.mT @ X
        return X


@dataclass(frozen=True)
class Entrywise(Nuclear):
    def grad(self, S: Tensor) -> Tensor:
        return S.sign()


@dataclass(frozen=True)
class FrobeniusValue(Nuclear):
    def value(self, S: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(S.double())


@dataclass(frozen=True)
class SquaredValue(Nuclear):
    def value(self, S: Tensor) -> Tensor:
        return super().value(S).square()


@dataclass(frozen=True)
class BallTooLarge(Nuclear):
    def violation(self, X: Tensor) -> Tensor:
        return super().violation(X / 2)


@dataclass(frozen=True)
class BallTooSmall(Nuclear):
    def violation(self, X: Tensor) -> Tensor:
        return super().violation(2 * X)


@dataclass(frozen=True)
class AverageInsteadOfLargest(Nuclear):
    """The unit ball of the RMS singular value: contains the spectral ball, agrees with it on flat spectra."""

    def violation(self, X: Tensor) -> Tensor:
        rms = torch.linalg.vector_norm(torch.linalg.svdvals(X.double()), dim=-1) / min(X.shape[-2:]) ** 0.5
        return torch.where(rms > 1 + 1e-12, rms - 1, 0.0)


@dataclass(frozen=True)
class NeverViolated(Nuclear):
    def violation(self, X: Tensor) -> Tensor:
        return torch.zeros(X.shape[:-2], dtype=torch.float64)


@dataclass(frozen=True)
class WritesToItsArgument(Nuclear):
    def value(self, S: Tensor) -> Tensor:
        return super().value(S.div_(2)) * 2


@dataclass(frozen=True)
class KyFan:
    """K = sum of the two largest singular values, correct: K* is zero where sigma_1 <= 1 and sum sigma <= 2."""

    solver: object = svd()

    def value(self, S: Tensor) -> Tensor:
        return torch.linalg.svdvals(S)[..., :2].sum(-1)

    def grad(self, S: Tensor) -> Tensor:
        U, s, Vh = torch.linalg.svd(S, full_matrices=False)
        return (U[..., :2] * (s[..., None, :2] > 1e-12)) @ Vh[..., :2, :]

    def excesses(self, X: Tensor) -> list[Tensor]:
        s = torch.linalg.svdvals(X)
        return [s[..., 0] - 1, s.sum(-1) / 2 - 1]

    def violation(self, X: Tensor) -> Tensor:
        excess = torch.stack(self.excesses(X)).amax(0)
        return torch.where(excess > 1e-12, excess, 0.0)

    def conjugate(self, X: Tensor) -> Tensor:
        return torch.where(self.violation(X) > 0, torch.inf, 0.0)


@dataclass(frozen=True)
class KyFanWithoutItsFirstBound(KyFan):
    def excesses(self, X: Tensor) -> list[Tensor]:
        return super().excesses(X)[1:]


@dataclass(frozen=True)
class KyFanWithoutItsSecondBound(KyFan):
    def excesses(self, X: Tensor) -> list[Tensor]:
        return super().excesses(X)[:1]


MISTAKES = {
    WrongFactor: [laws.gradient_is_the_derivative_of_the_value, laws.fenchel_young_holds_with_equality_at_the_gradient],
    WrongSign: [laws.gradient_is_the_derivative_of_the_value, laws.gradient_is_monotone, laws.gradient_is_a_subgradient],
    DroppedU: [laws.gradient_is_the_derivative_of_the_value, laws.rotations_change_nothing],
    MissingNormalisation: [laws.gradient_is_the_derivative_of_the_value, laws.gradient_is_a_subgradient],
    NormOfTheWholeBatch: [laws.a_batch_is_its_matrices],
    Entrywise: [laws.gradient_is_the_derivative_of_the_value, laws.rotations_change_nothing],
    FrobeniusValue: [laws.gradient_is_the_derivative_of_the_value, laws.conjugate_is_the_supremum],
    SquaredValue: [laws.gradient_is_the_derivative_of_the_value, laws.fenchel_young_holds_with_equality_at_the_gradient],
    BallTooLarge: [laws.conjugate_is_the_supremum],
    BallTooSmall: [laws.conjugate_is_the_supremum, laws.fenchel_young_holds_with_equality_at_the_gradient],
    AverageInsteadOfLargest: [laws.conjugate_is_the_supremum],
    NeverViolated: [laws.conjugate_is_the_supremum],
    WritesToItsArgument: [laws.arguments_are_only_read],
    KyFanWithoutItsFirstBound: [laws.conjugate_is_the_supremum],
    KyFanWithoutItsSecondBound: [laws.conjugate_is_the_supremum],
}


ALL_LAWS = (*laws.LAWS, *laws.SPECTRAL_LAWS, *laws.SYMMETRIC_LAWS)


def broken(mistake, law):
    try:
        law(mistake(solver=svd()))
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    ("mistake", "law"),
    [pytest.param(m, law, id=f"{m.__name__}-{law.__name__}") for m, caught in MISTAKES.items() for law in caught],
)
def test_the_mistake_is_caught_by_the_law(mistake, law):
    assert broken(mistake, law)


# The gradient at the two largest of a generic spectrum and of sparse points is differentiable and monotone, so every law
# but those of the batch with ties applies to the correct map; it must pass them all.
@pytest.mark.parametrize("law", ALL_LAWS, ids=lambda law: law.__name__)
def test_a_correct_ky_fan_norm_is_not_accused(law):
    law(KyFan())


def test_only_sparse_points_see_the_dropped_bound_of_a_ky_fan_norm(monkeypatch):
    # The reason why the laws visit rank one and two: on dense matrices sum sigma <= 2 binds first, and every law passes.
    monkeypatch.setattr(laws, "sparse", lambda: iter(()))
    assert not any(broken(KyFanWithoutItsFirstBound, law) for law in ALL_LAWS)
