"""AdamW groups are torch.optim.AdamW: bit for bit of its fused kernel, to rounding of its plain one."""

import pytest
import torch
from torch import nn

import schatten

SHAPES = [(), (7,), (4, 3), (2, 3, 4)]

OPTIONS = [
    {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    {"betas": (0.8, 0.999), "eps": 1e-4, "weight_decay": 0.0},
    {"betas": (0.0, 0.9), "eps": 1e-8, "weight_decay": 0.5, "maximize": True},
]


def run(optimizer, dtype, steps=10):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    opt = optimizer(params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        opt.step()
    return params, opt


def group(options):
    return lambda params: schatten.Muon([{"params": params, "algorithm": "adamw", **options}], lr=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("options", OPTIONS, ids=["ours", "torch's", "ascent"])
def test_an_adamw_group_is_torchs_fused_adamw_bit_for_bit(options, dtype):
    ours, opt = run(group(options), dtype)
    theirs, torchs = run(lambda params: torch.optim.AdamW(params, lr=0.01, fused=True, **options), dtype)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][key], torchs.state[q][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("options", OPTIONS, ids=["ours", "torch's", "ascent"])
def test_an_adamw_group_is_torchs_plain_adamw_up_to_rounding(options):
    ours, _ = run(group(options), torch.float64)
    theirs, _ = run(lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False, **options), torch.float64)
    for p, q in zip(ours, theirs, strict=True):
        # fp64, ten steps of a dozen operations in another order.
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_bf16_parameters_are_stepped_as_fp32_ones_and_rounded_at_the_end_of_each_step():
    options = {"weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    start, gradients = torch.randn(9).bfloat16(), torch.randn(10, 9).bfloat16()
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = schatten.Muon([{"params": p, "algorithm": "adamw", "rounding": "nearest", **options}], lr=0.01)
    theirs = torch.optim.AdamW([q], lr=0.01, fused=True, **options)
    for g in gradients:
        p.grad, q.grad = g.clone(), g.float()
        ours.step()
        theirs.step()
        with torch.no_grad():
            q.copy_(q.bfloat16())
        assert torch.equal(p.float(), q)
    assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
