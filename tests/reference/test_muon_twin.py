"""A slow literal Muon in fp64, one matrix, one number and one formula at a time, which the optimizer must equal."""

import math

import pytest
import torch
from torch import nn

import schatten

STEPS = 30

SHAPES = [(5, 3), (3, 7), (4, 4)]


def factor(scale, fan_out, fan_in):
    if scale == "adamw-rms":
        return 0.2 * math.sqrt(max(fan_out, fan_in))
    if scale == "keller":
        return math.sqrt(max(1, fan_out / fan_in))
    if scale == "mup":
        return math.sqrt(fan_out / fan_in)
    assert scale == "none"
    return 1.0


def polar(S):
    U, _, Vh = torch.linalg.svd(S, full_matrices=False)
    return U @ Vh


def twin(W, gradients, schedule, *, form, nesterov, decay, scale, maximize=False):
    """Muon as its papers write it: every step of one fp64 matrix, `schedule` giving (lr, weight_decay, beta) of each."""
    M = torch.zeros_like(W)
    for G, (lr, weight_decay, beta) in zip(gradients, schedule, strict=True):
        if maximize:
            G = -G
        if form == "ema":
            M = beta * M + (1 - beta) * G
            S = (1 - beta) * G + beta * M if nesterov else M
        else:
            M = beta * M + G
            S = G + beta * M if nesterov else M
        U = factor(scale, *W.shape) * polar(S)
        if decay == "explicit":
            W = (1 - lr * weight_decay) * W - lr * U
        else:
            W = (W - lr * U) / (1 + lr * weight_decay)
    return W, M


def run(W, gradients, schedule, **options):
    p = nn.Parameter(W.clone())
    opt = schatten.Muon([p], **options, solver=schatten.solvers.svd())
    for G, (lr, weight_decay, beta) in zip(gradients, schedule, strict=True):
        opt.param_groups[0].update(lr=lr, weight_decay=weight_decay, momentum=beta)
        p.grad = G.clone()
        opt.step()
    return p.detach(), opt.state[p]["momentum_buffer"]


def problem(shape):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    return W, torch.randn(STEPS, *shape, generator=generator, dtype=torch.float64)


CONSTANT = [(0.05, 0.3, 0.95)] * STEPS
SCHEDULED = [(0.1 / (1 + t), 0.3 - 0.01 * t, 0.85 + 0.005 * t) for t in range(STEPS)]

# Both sides do fp64 arithmetic in other orders: 1e-16 per operation, amplified at worst by the condition of a signal, at
# most 6e3 among these Gaussian ones, and added over 30 steps. Measured 5e-16.
PRECISION = 1e-12


@pytest.mark.parametrize("scale", ["adamw-rms", "keller", "mup", "none"])
@pytest.mark.parametrize("decay", ["explicit", "implicit"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("form", ["ema", "sum"])
def test_muon_equals_its_formula_in_every_combination_of_its_options(form, nesterov, decay, scale):
    options = {"form": form, "nesterov": nesterov, "decay": decay, "scale": scale}
    for shape in SHAPES:
        W, gradients = problem(shape)
        for schedule in (CONSTANT, SCHEDULED):
            ours, theirs = run(W, gradients, schedule, **options), twin(W, gradients, schedule, **options)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).norm() <= PRECISION * b.norm(), f"{shape}: {(a - b).norm() / b.norm():.2g}"


def test_maximize_equals_the_formula_on_negated_gradients():
    options = {"form": "ema", "nesterov": True, "decay": "explicit", "scale": "adamw-rms", "maximize": True}
    W, gradients = problem((5, 3))
    ours, theirs = run(W, gradients, CONSTANT, **options), twin(W, gradients, CONSTANT, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= PRECISION * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_runs_stay_near_the_formula(dtype):
    W, gradients = problem((5, 3))
    W, gradients = W.to(dtype), gradients.to(dtype)  # what is tested is the arithmetic, not the rounding of the problem
    options = {"form": "ema", "nesterov": True, "decay": "explicit", "scale": "adamw-rms"}
    ours, buffer = run(W, gradients, CONSTANT, **options)
    theirs, M = twin(W.double(), gradients.double(), CONSTANT, **options)
    # fp32: an ulp of 6e-8 per step and operation; measured 4e-7. bf16: state is fp32, but every stored weight is off by a
    # random ulp, so by 2^-8 |w| sqrt(30) in the mean square at most; measured 0.012 of 0.021.
    weights, state = {torch.float32: (5e-6, 1e-6), torch.bfloat16: (2**-8 * 30**0.5, 1e-6)}[dtype]
    assert (ours - theirs).norm() <= weights * theirs.norm()
    assert (buffer - M).norm() <= state * M.norm()
