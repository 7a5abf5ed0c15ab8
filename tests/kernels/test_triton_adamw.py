"""AdamW over many tensors in one launch against torch's fused step."""

import pytest

pytest.importorskip("triton")

from typing import Any

import torch
from torch import Tensor

from schatten.kernels import Tables
from schatten.kernels.triton import adamw_
from schatten.kernels.triton.adamw import LOOKED_AT, TILE
from schatten.rounding import stochastic_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# One entry, less than a tile, one tile, a little more, many; and none.
SIZES = (1, 700, 0, TILE, TILE + 5, 3 * TILE + 1)

PLAIN: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}


def near(found: Tensor, wanted: Tensor) -> None:
    """Both divide and take roots exactly rounded, but may contract products and sums in other places, in every step anew."""
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-7)


class Trained:
    """Tensors of `sizes` with their averages and counters, stepped by the kernel."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes]
        self.m, self.v = ([torch.zeros(n, device=DEVICE) for n in sizes] for _ in range(2))
        self.steps = [torch.zeros((), device=DEVICE) for _ in sizes]

    def step(self, grads: list[Tensor], finite: list[Tensor] | None = None, **changed: Any) -> None:
        for i, t in enumerate(self.steps):
            t += 1 if finite is None else finite[i]
        own: dict[str, Any] = {**PLAIN, "scale": None, "noise": None, "tables": Tables(), **changed}
        adamw_(self.params, grads, self.m, self.v, self.steps, finite, **own)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.m, *self.v]


def gradients(k: int, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(k + 1)
    return [torch.randn(n, generator=generator).to(DEVICE, dtype) for n in sizes]


def by_torch(params: list[Tensor], all_grads: list[list[Tensor]], **changed: Any) -> list[Tensor]:
    """Parameters and averages after torch.optim.AdamW's fused steps."""
    own = {**PLAIN, **changed}
    params = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, betas=(own.pop("beta1"), own.pop("beta2")), fused=True, **own)
    for grads in all_grads:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [*params, *(optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in params)]


def agree(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        near(a, b)


@pytest.mark.parametrize("changed", [{}, {"maximize": True}, {"weight_decay": 0.0, "eps": 1e-3}, {"beta1": 0.0, "beta2": 0.5}])
def test_several_steps_are_those_of_torch(changed: dict[str, Any]) -> None:
    ours, steps = Trained(), [gradients(k) for k in range(4)]
    wanted = by_torch(ours.params, steps, **changed)
    for grads in steps:
        ours.step(grads, **changed)
    agree(ours.tensors(), wanted)


def test_gradients_are_unscaled_without_being_written_to() -> None:
    ours, grads, scale = Trained(), gradients(0), torch.tensor(3.0, device=DEVICE)
    wanted = by_torch(ours.params, [[g / 3 for g in grads]])
    ours.step(grads, scale=scale)
    agree(ours.tensors(), wanted)
    assert all(map(torch.equal, grads, gradients(0)))


def test_numbers_may_lie_on_the_device() -> None:
    ours, grads = Trained(), gradients(0)
    wanted = by_torch(ours.params, [grads])
    ours.step(grads, None, **{key: torch.tensor(PLAIN[key], device=DEVICE) for key in ("lr", "beta1", "beta2")})
    # 1 - beta of a beta in fp32 has lost the digits of beta's rounding.
    for a, b in zip(ours.tensors(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_tensor_has_its_own_count_of_steps() -> None:
    ours, grads = Trained((5, 5)), [gradients(0, (5,))[0]] * 2
    ours.params[1].copy_(ours.params[0])
    start = ours.params[0].clone()
    ours.steps[0] += 1e6
    ours.step(grads)
    assert torch.equal(ours.m[0], ours.m[1]) and torch.equal(ours.v[0], ours.v[1])
    # After a million steps there is nothing to correct.
    late = start * (1 - 1e-3) - 1e-2 * ours.m[0] / (ours.v[0].sqrt() + 1e-8)
    near(ours.params[0], late)
    near(ours.params[1], by_torch([start], [grads[:1]])[0])


def test_many_more_tensors_than_are_looked_at_together_find_their_own_entries() -> None:
    sizes = tuple(1 + i % 3 for i in range(2 * LOOKED_AT + 3))
    if DEVICE == "cpu":
        sizes = (*(1,) * LOOKED_AT, 3, TILE + 2)
    ours, grads = Trained(sizes), gradients(0, sizes)
    wanted = by_torch(ours.params, [grads])
    ours.step(grads)
    agree(ours.tensors(), wanted)


def test_a_tensor_whose_gradient_is_not_finite_stays_as_it_is() -> None:
    ours, grads = Trained(), gradients(0)
    ours.step(gradients(1))
    wanted = [t.clone() for t in ours.tensors()]
    grads[1][3], grads[-1][-1] = torch.nan, torch.inf
    count = len(SIZES)
    finite = [torch.tensor(i not in (1, count - 1), device=DEVICE) for i in range(count)]
    ours.step(grads, finite)
    found = ours.tensors()
    for i in range(len(found)):
        assert torch.equal(found[i], wanted[i]) == (i % count in (1, 2, count - 1))
        assert found[i].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stepped_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    ours, grads = Trained(dtype=dtype), gradients(0, dtype=dtype)
    wanted = by_torch([p.float() for p in ours.params], [[g.float() for g in grads]])
    ours.step(grads)
    agree([*ours.m, *ours.v], wanted[len(SIZES) :])
    for p, want in zip(ours.params, wanted, strict=False):
        # Half a unit in the last place, and what the two differ by in fp32.
        assert ((p.float() - want).abs() <= torch.finfo(dtype).eps * want.abs() / 2 + 1e-6).all()


def test_gradients_may_be_of_another_precision_than_parameters() -> None:
    ours, grads = Trained(), gradients(0, dtype=torch.bfloat16)
    wanted = by_torch(ours.params, [[g.float() for g in grads]])
    ours.step(grads)
    agree(ours.tensors(), wanted)


@pytest.mark.parametrize("skipping", [False, True])
def test_noise_is_that_of_the_eager_rounding_bit_for_bit(skipping: bool) -> None:
    # Decay by a power of two of eight digits is exact in fp32 with every order of operations.
    ours = Trained(dtype=torch.bfloat16)
    before = [p.float() for p in ours.params]
    owns = [17 + 0x9ABCDEF1 * i % (1 << 32) for i in range(len(SIZES))]
    finite = [torch.tensor(True, device=DEVICE) for _ in SIZES] if skipping else None
    nothing = [torch.zeros_like(p) for p in ours.params]
    ours.step(nothing, finite, lr=2**-6, weight_decay=2**-4, noise=list(zip(ours.steps, owns, strict=True)))
    for p, old, own in zip(ours.params, before, owns, strict=True):
        assert torch.equal(p, stochastic_bf16(old * (1 - 2**-10), torch.tensor(0x9E3779B1 + own)))
    assert not all(torch.equal(p.float(), old) for p, old in zip(ours.params, before, strict=True))


def test_tensors_at_odd_addresses_are_served_as_well() -> None:
    ours, grads = Trained((TILE + 3,)), gradients(0, (TILE + 3,))
    wanted = by_torch(ours.params, [grads])
    for tensors in (ours.params, grads, ours.m, ours.v):
        shifted = torch.cat([torch.zeros(1, device=DEVICE), tensors[0]])[1:]
        assert shifted.data_ptr() % 16
        tensors[0] = shifted
    ours.step(grads)
    agree(ours.tensors(), wanted)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_nothing_to_step_is_no_launch(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr("schatten.kernels.triton.adamw.launch", lambda *arguments, **constants: launched.append(arguments))
    Trained(sizes).step(gradients(0, sizes))
    assert not launched
    Trained((3,)).step(gradients(0, (3,)))
    assert len(launched) == 1, "the watch is on what a step launches"
