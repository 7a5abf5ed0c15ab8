"""Stochastic rounding: exact where bf16 is, unbiased where it is not, repeatable, and blind to the user's random state."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten import batching
from schatten.rounding import stochastic_bf16, store_
from tests.contracts.driving import step

DRAWS = 1 << 16


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 255.7, 1e-30, -3e30, 1.0 + 2**-8 - 2**-16, 3e-39, math.pi])
def test_values_go_to_a_neighbour_with_the_value_as_their_mean(value):
    value = float(torch.tensor(value))
    rounded = stochastic_bf16(torch.full((DRAWS,), value), seed=7).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low <= value <= high
    # The two neighbours, found by truncating the lower half of the fp32 pattern, with nothing else drawn.
    bits = torch.tensor(value).view(torch.int32) & -(1 << 16)
    toward_zero = bits.view(torch.float32).item()
    away = (bits + (1 << 16)).view(torch.float32).item()
    assert set(rounded.unique().tolist()) <= {toward_zero, away}
    gap, up = abs(away - toward_zero), abs(value - toward_zero) / abs(away - toward_zero)
    # A mean of 65536 Bernoulli draws is within five standard deviations but for one seed in 1.7 million.
    assert abs(rounded.mean().item() - value) <= 5 * gap * math.sqrt(up * (1 - up) / DRAWS)


def test_what_bf16_holds_exactly_stays_whatever_the_seed():
    finite = torch.arange(1 << 16).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    finite = finite[finite.isfinite()]
    assert len(finite) == 2 * 255 * 128  # signs x exponents of finite numbers x mantissas
    for seed in (0, 1, 2**62 + 1):
        rounded = stochastic_bf16(finite, seed)
        assert torch.equal(rounded.view(torch.int16), finite.bfloat16().view(torch.int16))  # the sign of zero too


def test_infinity_and_nan_stay_what_they_are():
    # Also a NaN whose payload is in the bits that rounding drops or carries out of.
    patterns = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
    values = torch.tensor([b - (1 << 32) * (b >> 31) for b in patterns], dtype=torch.int32).view(torch.float32)
    rounded = stochastic_bf16(values.repeat(1000, 1), seed=3)
    assert (rounded[:, 0] == torch.inf).all() and (rounded[:, 1] == -torch.inf).all()
    assert rounded[:, 2:].isnan().all()


def test_the_noise_is_fixed_by_its_seed_and_other_for_another():
    X = torch.randn(1000)
    assert torch.equal(stochastic_bf16(X, 5), stochastic_bf16(X, 5))
    # Of 1000 random fractions about a third fall to the other side under another seed.
    assert (stochastic_bf16(X, 5) != stochastic_bf16(X, 6)).sum() > 100


def test_neighbouring_elements_are_rounded_independently():
    ups = (stochastic_bf16(torch.full((DRAWS,), 1.0 + 2**-8), seed=11) > 1).double() - 0.5
    # The product of two fair signs of size 1/2 has standard deviation 1/4; five of them over the square root of the count.
    for lag in (1, 2, 64):
        assert abs((ups[:-lag] * ups[lag:]).mean()) < 5 * 0.25 / math.sqrt(DRAWS - lag)


def test_the_layout_in_memory_is_kept():
    X = torch.randn(6, 4).T
    p = torch.zeros(6, 4, dtype=torch.bfloat16).T
    store_(p, X, "stochastic", 1)
    assert p.stride() == (1, 4) and (p.float() - X).abs().max() < X.abs().max() * 2**-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_round_to_nearest(dtype):
    X = torch.randn(100, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    p = torch.zeros(100, dtype=dtype)
    store_(p, X, "stochastic", 1)
    assert torch.equal(p, X.to(dtype))


def steps(opt, params, count=3):
    for _ in range(count):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
        step(opt)
    return [p.detach().clone() for p in params]


def bf16_optimizer(**options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in ((16, 8), (16, 8), (40,))]
    return schatten.Muon([{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}], lr=1e-3, **options), params


def test_steps_do_not_touch_the_global_random_state_nor_depend_on_it(any_preset):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(steps(*bf16_optimizer()))
        p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
        results[-1] += steps(any_preset([p]), [p])
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_each_step_draws_new_noise():
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    opt, patterns = schatten.Muon([p], lr=1e-2), []
    p.grad = torch.zeros_like(p)
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1)
        opt.step()
        patterns.append(p != 1)
    # Decay of 1e-3 moves 1 to 1 - 2^-8 with probability 0.256: 1049 of 4096 +- 5 * 28 each time, never the same ones.
    assert all(abs(pattern.sum() - 1049) < 140 for pattern in patterns)
    both = (patterns[0] & patterns[1]).sum()
    assert abs(both - 4096 * 0.256**2) < 5 * math.sqrt(4096 * 0.0655)


def test_noise_for_many_is_that_of_each_alone():
    X, seeds = torch.randn(3, 2, 5, 7), torch.tensor([1, 2**40 + 3, -7])
    together = stochastic_bf16(X, seeds)
    assert all(torch.equal(together[i], stochastic_bf16(X[i], seeds[i])) for i in range(3))


@pytest.mark.parametrize("shape", [(6, 4), (12, 6)])
def test_small_matrices_are_rounded_together_to_the_bits_each_has_alone(monkeypatch, shape):
    def trained(most):
        monkeypatch.setattr(batching, "SMALL", most)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for _ in range(3)]
        opt = schatten.Muon([{"params": params, "layout": schatten.Layout(split=2)}], lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            opt.step()
        return params

    assert all(torch.equal(a, b) for a, b in zip(trained(1 << 14), trained(0), strict=True))
