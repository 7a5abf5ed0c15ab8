"""Compressors with one mistake each; the laws of `tests/contracts/compressor_laws.py` must catch every one."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from schatten.compressors import Identity, Message, Natural, RankK, Sign, TopK
from tests.contracts import compressor_laws as laws


@dataclass(frozen=True)
class KeepsTheSmallest(TopK):
    def encode(self, X: Tensor, seed: int) -> Message:
        flat = X.flatten(-2)
        positions = flat.abs().topk(self.count(*X.shape[-2:]), dim=-1, largest=False).indices
        dtype = torch.int16 if flat.shape[-1] <= 1 << 15 else torch.int32
        return flat.gather(-1, positions), positions.to(dtype).view(torch.uint8)


@dataclass(frozen=True)
class ForgetsTheSign(TopK):
    def encode(self, X: Tensor, seed: int) -> Message:
        return super().encode(X.abs(), seed)


@dataclass(frozen=True)
class WrapsPositions(TopK):
    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        values, sent = message
        wide = sent.shape[-1] == 4 * values.shape[-1]
        wrapped = (sent.view(torch.int32) & 0x7FFF).view(torch.uint8) if wide else sent
        return super().decode((values, wrapped), shape, dtype)


@dataclass(frozen=True)
class SendsInt16(TopK):
    def encode(self, X: Tensor, seed: int) -> Message:
        values, sent = super().encode(X, seed)
        return values, sent.view(torch.int16)

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return super().decode((message[0], message[1].view(torch.uint8)), shape, dtype)


@dataclass(frozen=True)
class CutsAtAThreshold(Identity):
    def encode(self, X: Tensor, seed: int) -> Message:
        positions = (X.abs() > 0.1 * X.abs().amax((-2, -1), keepdim=True)).nonzero()
        return positions, X[tuple(positions.T)]

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype).index_put_(tuple(message[0].T), message[1].to(dtype))


@dataclass(frozen=True)
class SharesItsMemory(Identity):
    def encode(self, X: Tensor, seed: int) -> Message:
        return (X.contiguous(),)


@dataclass(frozen=True)
class SendsStrides(Identity):
    def encode(self, X: Tensor, seed: int) -> Message:
        return (X.clone(),)

    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return message[0].to(dtype)


@dataclass(frozen=True)
class KeepsItsDtype(Identity):
    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return message[0]


@dataclass(frozen=True)
class ForgetsTheTranspose(RankK):
    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return (message[0] @ message[1]).to(dtype)


@dataclass(frozen=True)
class WithoutOrthonormalColumns(RankK):
    def encode(self, X: Tensor, seed: int) -> Message:
        U, _ = super().encode(X, seed)
        wide = X if X.shape[-2] <= X.shape[-1] else X.mT
        U = wide @ (wide.mT @ U)
        return U, U.mT @ wide


@dataclass(frozen=True)
class KeepsTheTrailingDirections(RankK):
    def encode(self, X: Tensor, seed: int) -> Message:
        wide = X if X.shape[-2] <= X.shape[-1] else X.mT
        U = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., : self.rank]
        return U, U.mT @ wide


@dataclass(frozen=True)
class ClaimsTheSmallerShare(RankK):
    def contraction(self, m: int, n: int) -> float:
        return min(1.0, 1.5 * super().contraction(m, n))


@dataclass(frozen=True)
class RoundsDown(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        top = torch.where(X == 0, 1, X).abs()
        power = torch.exp2(torch.frexp(top).exponent.to(X.dtype) - 1)
        return super().encode(torch.where(X == 0, 0, X.sign() * power), seed)


@dataclass(frozen=True)
class RoundsToTheNearest(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        mantissa, exponent = torch.frexp(X)
        return super().encode(torch.exp2(exponent.to(X.dtype) - (mantissa.abs() < 0.75).to(X.dtype)) * X.sign(), seed)


@dataclass(frozen=True)
class DrawsFromTheGlobalState(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        return super().encode(X, int(torch.randint(1 << 30, ())))


@dataclass(frozen=True)
class DrawsForTheBatch(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        flat = X.reshape(-1, *X.shape[-2:])
        messages = [super(DrawsForTheBatch, self).encode(x, seed + i) for i, x in enumerate(flat)]
        return tuple(torch.stack(part).view(*X.shape[:-2], *part[0].shape) for part in zip(*messages, strict=True))


@dataclass(frozen=True)
class OneScaleForTheBatch(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        scale = X.abs().amax().clamp(min=1e-30)
        code, power = super().encode(X.sign() * (X.abs() / scale).clamp(min=1e-2), seed)
        return code, power * scale


@dataclass(frozen=True)
class HasNoScale(Natural):
    def encode(self, X: Tensor, seed: int) -> Message:
        code, scale = super().encode(X, seed)
        return code, torch.ones_like(scale)


@dataclass(frozen=True)
class ClaimsNineTenths(Natural):
    def contraction(self, m: int, n: int) -> float:
        return 0.9


@dataclass(frozen=True)
class WithoutTheScale(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        bits, scale = super().encode(X, seed)
        return bits, torch.ones_like(scale)


@dataclass(frozen=True)
class ScaledByTheRMS(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        return super().encode(X, seed)[0], X.square().mean((-2, -1), keepdim=True).sqrt()


@dataclass(frozen=True)
class MeanOfWhatIsNotZero(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        count = (X != 0).sum((-2, -1), keepdim=True).clamp(min=1)
        return super().encode(X, seed)[0], X.abs().sum((-2, -1), keepdim=True) / count


@dataclass(frozen=True)
class MeanOfTheBatch(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        bits, scale = super().encode(X, seed)
        return bits, scale.mean().expand_as(scale).contiguous()


@dataclass(frozen=True)
class BitsInTheOtherOrder(Sign):
    def decode(self, message: Message, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8)
        bits = (message[0].unsqueeze(-1) >> places & 1) << places.flip(0)
        return super().decode((bits.sum(-1, dtype=torch.uint8), message[1]), shape, dtype)


@dataclass(frozen=True)
class LooksForZero(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        return super().encode(X if bool(X.any()) else torch.zeros_like(X), seed)


@dataclass(frozen=True)
class WritesToItsArgument(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        message = super().encode(X, seed)
        X.abs_()
        return message


@dataclass(frozen=True)
class HidesNonFiniteEntries(Sign):
    def encode(self, X: Tensor, seed: int) -> Message:
        return super().encode(X.nan_to_num(0.0, 0.0, 0.0), seed)


MISTAKES = {
    KeepsTheSmallest(0.1): [laws.contraction_bounds_the_error],
    ForgetsTheSign(0.1): [laws.contraction_bounds_the_error],
    WrapsPositions(0.1): [laws.contraction_bounds_the_error],
    SendsInt16(0.1): [laws.messages_can_be_sent],
    CutsAtAThreshold(): [laws.message_shapes_depend_on_the_shape_alone, laws.nothing_waits_for_a_value],
    SharesItsMemory(): [laws.a_message_is_a_snapshot],
    SendsStrides(): [laws.messages_can_be_sent],
    KeepsItsDtype(): [laws.results_have_the_shape_and_the_dtype_asked_for],
    ForgetsTheTranspose(2): [laws.results_have_the_shape_and_the_dtype_asked_for],
    WithoutOrthonormalColumns(2): [laws.contraction_bounds_the_error],
    KeepsTheTrailingDirections(2): [laws.contraction_bounds_the_error],
    ClaimsTheSmallerShare(2): [laws.contraction_bounds_the_error],
    RoundsDown(): [laws.the_mean_is_the_input, laws.contraction_bounds_the_error],
    RoundsToTheNearest(): [laws.the_mean_is_the_input],
    DrawsFromTheGlobalState(): [laws.the_seed_alone_decides, laws.nothing_waits_for_a_value],
    DrawsForTheBatch(): [laws.a_batch_is_its_matrices],
    OneScaleForTheBatch(): [laws.a_batch_is_its_matrices, laws.a_non_finite_matrix_shows_and_does_not_spread],
    HasNoScale(): [laws.contraction_bounds_the_error, laws.the_mean_is_the_input],
    ClaimsNineTenths(): [laws.contraction_bounds_the_error],
    WithoutTheScale(): [laws.contraction_bounds_the_error, laws.zero_gives_zero],
    ScaledByTheRMS(): [laws.contraction_bounds_the_error],
    MeanOfWhatIsNotZero(): [laws.contraction_bounds_the_error],
    MeanOfTheBatch(): [laws.a_batch_is_its_matrices, laws.zero_gives_zero],
    BitsInTheOtherOrder(): [laws.contraction_bounds_the_error],
    LooksForZero(): [laws.nothing_waits_for_a_value],
    WritesToItsArgument(): [laws.a_message_is_a_snapshot],
    HidesNonFiniteEntries(): [laws.a_non_finite_matrix_shows_and_does_not_spread],
}


@pytest.mark.parametrize(
    ("mistake", "law"),
    [pytest.param(C, law, id=f"{type(C).__name__}-{law.__name__}") for C, caught in MISTAKES.items() for law in caught],
)
def test_the_mistake_is_caught_by_the_law(mistake, law):
    with pytest.raises(AssertionError):
        law(mistake)
