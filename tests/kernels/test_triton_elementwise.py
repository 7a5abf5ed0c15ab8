"""Triton's passes over buckets against the eager rules, entry by entry, on any memory layout."""

from typing import Any, Literal

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from schatten.kernels import Bucket, Onto, Tables
from schatten.kernels.triton import momentum_, quotient, retract_
from schatten.kernels.triton.weights import number as passed
from schatten.retractions import DecoupledDecay
from schatten.rounding import stochastic_bf16
from schatten.signals import Momentum
from schatten.solvers.core import frobenius

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# (blocks, fan_out, fan_in): within a tile of either kind, one entry over it, more than one of both, tall, wide and thin.
SHAPES = ((1, 5, 7), (3, 65, 33), (2, 1, 4097), (1, 70, 130), (2, 9, 1))


def layouts(blocks: int, fan_out: int, fan_in: int) -> dict[str, tuple[int, tuple[int, int, int], int]]:
    """Places of such a stack in a flat tensor: (entries of that, strides, offset)."""
    size = blocks * fan_out * fan_in
    return {
        "plain": (size, (fan_out * fan_in, fan_in, 1), 0),
        "transposed": (size, (fan_out * fan_in, 1, fan_out), 0),
        "blocks inside rows": (size + 3, (fan_in, blocks * fan_in, 1), 3),
        "every other column": (2 * size + 1, (2 * fan_out * fan_in, 2 * fan_in, 2), 1),
    }


def bucket(values: Tensor, layout: str, dtype: torch.dtype = torch.float32) -> Bucket:
    """Stacks (members, blocks, fan_out, fan_in) laid out so, in tensors that are 7 elsewhere."""
    _, *shape = values.shape
    size, strides, offset = layouts(*shape)[layout]
    tensors = [torch.full((size,), 7.0, dtype=dtype, device=values.device) for _ in values]
    for t, value in zip(tensors, values, strict=True):
        t.as_strided(shape, strides, offset).copy_(value)
    return Bucket(tensors, (shape[0], shape[1], shape[2]), strides, offset)


def read(b: Bucket) -> Tensor:
    """(members, blocks, fan_out, fan_in)."""
    return torch.stack([t.as_strided(b.shape, b.strides, b.offset) for t in b.tensors])


def untouched_elsewhere(b: Bucket) -> bool:
    """Whether what no matrix covers is still 7."""
    for t in b.tensors:
        rest = t.clone()
        rest.as_strided(b.shape, b.strides, b.offset).fill_(7)
        if not bool((rest == 7).all()):
            return False
    return True


def near(found: Tensor, wanted: Tensor) -> None:
    """A kernel and torch may contract a product and a sum in different places: three roundings of fp32 apart."""
    torch.testing.assert_close(found, wanted, rtol=4e-7, atol=4e-7)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def flags(*values: bool) -> list[Tensor]:
    return [torch.tensor(v, device=DEVICE) for v in values]


def run(G: Bucket, M: Bucket, finite: list[Tensor] | None = None, **changed: Any) -> tuple[Tensor, Tensor]:
    plain: dict[str, Any] = {
        "beta": 0.9,
        "form": "ema",
        "nesterov": True,
        "scale": None,
        "maximize": False,
        "dtype": torch.float32,
    }
    return momentum_(G, M, finite, **{**plain, "wide": False, "tables": Tables(), **changed})


@pytest.mark.parametrize("layout", layouts(1, 1, 1))
@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_and_signal_are_those_of_the_rule_in_any_layout(shape: tuple[int, int, int], layout: str) -> None:
    g, old = randn(2, *shape), randn(2, *shape, seed=1)
    G, M = bucket(g, layout), bucket(old, "plain")
    S, norm = run(G, M)
    want, state = Momentum()(g, {"momentum_buffer": old}, {"momentum": 0.9})
    near(read(M), state["momentum_buffer"])
    near(S, want.flatten(0, 1))
    torch.testing.assert_close(norm, frobenius(S.double()).float(), rtol=2e-7, atol=0)
    assert S.is_contiguous() and untouched_elsewhere(G) and torch.equal(read(G), g)


@pytest.mark.parametrize("layout", ["transposed", "blocks inside rows"])
def test_momentum_may_lie_elsewhere_than_the_gradient(layout: str) -> None:
    g, old = randn(2, 3, 65, 33), randn(2, 3, 65, 33, seed=1)
    M = bucket(old, layout)
    run(bucket(g, "plain"), M, nesterov=False)
    near(read(M), old.lerp(g, 0.1))
    assert untouched_elsewhere(M)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.95, torch.tensor(0.95)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_both_forms_of_momentum_with_and_without_nesterov(
    form: Literal["ema", "sum"], nesterov: bool, beta: float | Tensor
) -> None:
    g, old = randn(2, 1, 9, 20), randn(2, 1, 9, 20, seed=1)
    beta = beta.to(DEVICE) if isinstance(beta, Tensor) else beta
    M = bucket(old, "plain")
    S, _ = run(bucket(g, "plain"), M, form=form, nesterov=nesterov, beta=beta)
    want, state = Momentum(form, nesterov)(g, {"momentum_buffer": old}, {"momentum": beta})
    near(read(M), state["momentum_buffer"])
    near(S, want.flatten(0, 1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_any_precision_are_unscaled_and_negated_in_fp32(dtype: torch.dtype) -> None:
    g, old = randn(2, 1, 9, 20).to(dtype), randn(2, 1, 9, 20, seed=1)
    M = bucket(old, "plain")
    run(bucket(g, "plain", dtype), M, nesterov=False, maximize=True, scale=torch.tensor(3.0, device=DEVICE))
    near(read(M), old.lerp(-g.float() / 3, 0.1))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_signal_is_rounded_once_and_lies_down_if_it_is_tall(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    g, old = randn(2, *shape), torch.zeros(2, *shape, device=DEVICE)
    S, norm = run(bucket(g, "plain"), bucket(old, "plain"), beta=0.0, dtype=dtype, wide=True)
    want = g.flatten(0, 1).to(dtype)
    want = want.mT if shape[1] > shape[2] else want
    assert S.dtype == dtype and S.is_contiguous() and torch.equal(S, want)
    # Of what is returned, not of what it was before it was rounded: their quotient has norm 1.
    torch.testing.assert_close(norm, frobenius(S.double()).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e36])
def test_the_norm_neither_overflows_nor_vanishes(size: float) -> None:
    g = randn(1, 2, 65, 70) * size
    S, norm = run(bucket(g, "plain"), bucket(torch.zeros_like(g), "plain"), beta=0.0)
    want = torch.linalg.vector_norm(S.double(), dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(norm, want.float(), rtol=2e-7, atol=0)


def test_a_norm_of_zero_is_one_and_of_nan_or_inf_is_none() -> None:
    g = torch.zeros(1, 4, 5, 6, device=DEVICE)
    g[0, 1, 2, 3], g[0, 2, 0, 0], g[0, 3, 0, 0] = torch.nan, torch.inf, 1e-45
    _, norm = run(bucket(g, "plain"), bucket(torch.zeros_like(g), "plain"), form="sum")
    wanted = [1, torch.nan, torch.inf, torch.finfo(torch.float32).tiny]
    assert norm.flatten().tolist() == pytest.approx(wanted, nan_ok=True, rel=1e-6, abs=0)


def test_equal_steps_give_equal_bits_and_a_norm_counts_all_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schatten.kernels.triton.momentum.SUMS", 8)
    g = randn(1, 2, 65, 64 * 9)
    found = [run(bucket(g, "every other column"), bucket(g, "plain"), beta=0.0)[1] for _ in range(2)]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], frobenius(g[0].double()).float(), rtol=2e-7, atol=0)


def test_a_member_whose_gradient_is_not_finite_keeps_its_momentum_and_disturbs_no_other() -> None:
    g, old = randn(3, 2, 9, 20), randn(3, 2, 9, 20, seed=1)
    g[1, 0, 3, 4], g[2, 1, 0, 0] = torch.nan, torch.inf
    M = bucket(old, "plain")
    S, norm = run(bucket(g, "plain"), M, flags(True, False, False))
    want, state = Momentum()(g[:1], {"momentum_buffer": old[:1]}, {"momentum": 0.9})
    assert torch.equal(read(M)[1:], old[1:])
    near(read(M)[:1], state["momentum_buffer"])
    near(S[:2], want[0])
    assert norm[:2].isfinite().all() and not norm[[2, 5]].isfinite().any() and norm[[3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_matrices_have_norm_one_and_no_matrices_none(shape: tuple[int, int, int]) -> None:
    g = torch.zeros(2, *shape, device=DEVICE)
    S, norm = run(bucket(g, "plain"), bucket(g, "plain"), wide=True)
    assert S.shape == (2 * shape[0], *sorted(shape[1:])) and torch.equal(norm, torch.ones(2 * shape[0], 1, 1, device=DEVICE))
    retract_(torch.zeros(2 * shape[0], *shape[1:], device=DEVICE), Onto(bucket(g, "plain"), 1.0, 1.0))
    assert quotient(g[0], torch.ones(shape[0], 1, 1, device=DEVICE), torch.bfloat16).shape == shape


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_quotient_is_divided_in_fp32_and_rounded_once(dtype: torch.dtype, to: torch.dtype) -> None:
    X, norm = randn(3, 5, 70).to(dtype), randn(3, 1, 1, seed=1).abs() + 0.5
    found = quotient(X, norm, to)
    assert found.dtype == to and torch.equal(found, (X.float() / norm).to(to))


def test_a_quotient_has_its_matrices_in_the_layout_it_found_them_in() -> None:
    whole, norm = randn(3, 66, 70), randn(3, 1, 1, seed=1).abs() + 0.5
    views = (whole, whole.mT, whole[:, :5, 3:], whole[:, ::2, ::3].mT, whole[:1].expand(3, 66, 70))
    for X in (*views, whole.transpose(0, 1)[:, :3]):
        d = norm if len(X) == 3 else torch.full((len(X), 1, 1), 3.0, device=DEVICE)
        found = quotient(X, d, torch.bfloat16)
        assert torch.equal(found, (X / d).to(torch.bfloat16))
        assert (found.stride(-1) == 1) == (X.stride(-1) == 1)


def test_matrices_that_are_one_long_row_in_all_tensors_are_taken_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []
    for name in ("division", "momentum", "retract"):
        monkeypatch.setattr(f"schatten.kernels.triton.{name}.launch", lambda _kernel, count, *_, **__: programs.append(count))
    X, norm = randn(3, 40, 200), torch.ones(3, 1, 1, device=DEVICE)
    onto = Onto(bucket(X.unsqueeze(1), "plain"), 1.0, 1.0)
    for T in (X, X.mT):
        quotient(T, norm, torch.bfloat16)
    run(onto.weights, onto.weights, wide=True)
    retract_(X, onto)
    # 8000 entries are two tiles of a row, and four squares; the norms are one program a matrix.
    assert programs == [6, 6, 6, 3, 6]
    retract_(X.mT.contiguous().mT, onto)
    assert programs[-1] == 12


@pytest.mark.parametrize("size", [1e-44, 1e30])
def test_a_quotient_of_extreme_matrices_has_norm_one(size: float) -> None:
    X = torch.full((1, 4, 4), size, device=DEVICE)
    norm = torch.tensor(4 * size, device=DEVICE).clamp(min=torch.finfo(torch.float32).tiny).reshape(1, 1, 1)
    assert torch.equal(quotient(X, norm, torch.float32), X / norm)


@pytest.mark.parametrize("layout", layouts(1, 1, 1))
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_decay_and_move_in_any_layout(shape: tuple[int, int, int], layout: str) -> None:
    w, D = randn(2, *shape), randn(2, *shape, seed=1)
    W = bucket(w, layout)
    group = {"lr": 0.1, "weight_decay": 0.2}
    retract_(D.flatten(0, 1), Onto(W, 1 - 0.1 * 0.2, 0.3))
    near(read(W), DecoupledDecay()(w, D, 0.3, {}, group)[0])
    assert untouched_elsewhere(W)


@pytest.mark.parametrize("dtype", FLOATS)
def test_directions_of_any_precision_may_be_transposed_views(dtype: torch.dtype) -> None:
    w, D = randn(2, 3, 70, 33), randn(6, 33, 70, seed=1).to(dtype).mT
    for layout in ("plain", "transposed"):
        W = bucket(w, layout)
        retract_(D, Onto(W, 0.9, 0.3))
        near(read(W).flatten(0, 1), 0.9 * w.flatten(0, 1) - 0.3 * D.float())


def test_a_number_on_the_device_is_not_looked_at() -> None:
    number, device = torch.tensor(0.5, device=DEVICE), torch.zeros(1, device=DEVICE).device
    assert passed(number, device)[0] is number and passed(number, device)[1]
    assert passed(0.5, device) == (0.5, False)


def test_numbers_may_lie_on_the_device_or_the_host() -> None:
    w, D = randn(2, 1, 5, 6), randn(2, 5, 6, seed=1)
    want = 0.5 * w - 2 * D.unsqueeze(1)
    half = torch.tensor(0.5)
    for keep in (0.5, half, half.to(DEVICE), half.double().to(DEVICE)):
        for length in (2, torch.tensor(2.0, device=DEVICE)):
            W = bucket(w, "plain")
            retract_(D, Onto(W, keep, length))
            near(read(W), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_noise_half_precision_weights_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    # Multiples of 2^-10 below 2: the new weight is exact in fp32 with every order of operations, and rounded once.
    w, D = (randn(2, 1, 9, 70, seed=s).clamp(-1, 1).mul(1024).round() / 1024 for s in (0, 1))
    W = bucket(w, "plain", dtype)
    before = read(W).float()
    retract_(D.flatten(0, 1), Onto(W, 1.0, 0.5))
    assert torch.equal(read(W), (before - 0.5 * D).to(dtype))


@pytest.mark.parametrize("layout", ["plain", "transposed", "blocks inside rows"])
@pytest.mark.parametrize("finite", [False, True])
def test_noise_is_that_of_the_eager_rounding_bit_for_bit(layout: str, finite: bool) -> None:
    w, D = (randn(2, 3, 66, 5, seed=s).clamp(-2, 2).mul(2**14).round() / 2**14 for s in (0, 1))
    W = bucket(w, layout, torch.bfloat16)
    before = read(W).float()
    noise = [(torch.tensor(3.0, device=DEVICE), 0xFEDCBA98), (torch.tensor(70001.0, device=DEVICE), 12345)]
    retract_(D.flatten(0, 1), Onto(W, 1.0, 1.0, flags(True, True) if finite else None, noise))
    for found, old, d, (step, own) in zip(read(W), before, D, noise, strict=True):
        want = stochastic_bf16(old - d, step.to(torch.int64) * 0x9E3779B1 + own)
        assert torch.equal(found, want)
        assert not torch.equal(found, (old - d).to(torch.bfloat16))


def test_noise_leaves_what_is_not_finite_and_what_bf16_holds_and_falls_on_the_largest() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan, *[2.001e38] * 50], device=DEVICE)
    W = bucket(torch.zeros(1, 1, 1, len(values), device=DEVICE), "plain", torch.bfloat16)
    retract_(-values.reshape(1, 1, -1), Onto(W, 1.0, 1.0, None, [(torch.tensor(1.0, device=DEVICE), 5)]))
    found = read(W).flatten()
    assert found[:6].tolist() == values[:6].tolist() and bool(found[6].isnan())
    assert torch.equal(found[7:], stochastic_bf16(values, 0x9E3779B1 + 5)[7:])
    assert len(found[7:].unique()) == 2


def test_weights_of_a_member_that_was_not_finite_are_not_written() -> None:
    w, D = randn(3, 2, 9, 20), randn(6, 9, 20, seed=1)
    D[2:4] = torch.nan
    W = bucket(w, "plain")
    retract_(D, Onto(W, 0.9, 0.3, flags(True, False, True)))
    D = D.view_as(w)
    assert torch.equal(read(W)[1], w[1])
    near(read(W)[::2], 0.9 * w[::2] - 0.3 * D[::2])


def test_matrices_at_odd_addresses_are_served_as_well() -> None:
    g, old, D = randn(2, 1, 8, 16), randn(2, 1, 8, 16, seed=1), randn(2, 8, 16, seed=2)
    M, W = (Bucket([torch.zeros(129, device=DEVICE) for _ in old], (1, 8, 16), (128, 16, 1), 1) for _ in range(2))
    for b in (M, W):
        for t, value in zip(b.tensors, old, strict=True):
            t[1:].copy_(value.flatten())
    run(bucket(g, "plain"), M, nesterov=False)
    near(read(M), old.lerp(g, 0.1))
    retract_(D, Onto(W, 0.9, 0.3))
    near(read(W), 0.9 * old - 0.3 * D.unsqueeze(1))
