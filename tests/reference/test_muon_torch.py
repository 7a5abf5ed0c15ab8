"""With its solver and scale named, schatten's Muon is torch.optim.Muon, up to the noise of bf16 products."""

import pytest
import torch
from torch import nn

from schatten import Muon
from schatten.solvers import newton_schulz

STEPS = 50

SHAPES = [(32, 32), (64, 16), (16, 64), (48, 20), (20, 48), (5, 3), (3, 5), (1, 24), (24, 1), (2, 40)]

SCALES = {"keller": "original", "adamw-rms": "match_rms_adamw"}


def run(optimizer):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    start = [p.detach().clone() for p in params]
    opt = optimizer(params)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        opt.step()
    return [p.detach() - w for p, w in zip(params, start, strict=True)]


def relative_differences(ours, theirs):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(run(ours), run(theirs), strict=True)]


# Relative to the total change of 50 steps, in Frobenius norm, for each shape. torch normalises in bf16 and multiplies in
# bf16; ours normalises in fp32. Such noise of 2^-8 per entry and product is independent from step to step, so it shrinks
# beside the change. Measured at most 0.011 with our products in bf16 and 0.011 in fp32 (what is left is torch's own
# rounding). The nearest mistake, Nesterov's term left out, gives 0.056 or more, a momentum of 0.94 for 0.95 0.04.
BF16_NOISE = 0.02


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("scale", SCALES)
def test_fifty_steps_agree_with_torch_muon_on_ten_shapes(scale, nesterov, dtype):
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
    differences = relative_differences(
        lambda params: Muon(params, **options, scale=scale, solver=newton_schulz(dtype=dtype)),
        lambda params: torch.optim.Muon(params, **options, adjust_lr_fn=SCALES[scale]),
    )
    assert max(differences) < BF16_NOISE, dict(zip(SHAPES, differences, strict=True))


def test_the_agreement_tells_a_missing_nesterov_term_from_noise():
    differences = relative_differences(
        lambda params: Muon(params, lr=0.02, nesterov=False, scale="keller", solver=newton_schulz()),
        lambda params: torch.optim.Muon(params, lr=0.02),
    )
    assert min(differences) > 2 * BF16_NOISE, dict(zip(SHAPES, differences, strict=True))


def test_torchs_other_options_have_the_same_names_and_defaults():
    theirs = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    ours = Muon([torch.nn.Parameter(torch.zeros(2, 2))]).defaults
    shared = ("lr", "weight_decay", "momentum", "nesterov")
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
