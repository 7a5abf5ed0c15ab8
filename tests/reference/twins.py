"""What every literal twin shares: the problems, the optimizer's side of the comparison, and how near it must come.

A twin is written from the equations: one fp64 matrix, exact singular value decompositions, one step at a time.
"""

import math

import torch
from torch import nn

STEPS = 30

SHAPES = [(5, 3), (3, 7), (4, 4)]

SEEDS = [0, 1]

# Both sides do fp64 arithmetic in other orders: 1e-16 per operation, amplified at worst by the condition of a signal, at
# most 6e3 among these Gaussian ones, and added over 30 steps.
PRECISION = 1e-11


def problem(shape, seed=0, steps=STEPS):
    """A start and one gradient per step, Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    return W, torch.randn(steps, *shape, generator=generator, dtype=torch.float64)


def trained(build, W, gradients):
    """The optimizer's weights after the gradients, and the optimizer."""
    p = nn.Parameter(W.clone())
    opt = build([p])
    for G in gradients:
        p.grad = G.clone()
        opt.step()
    return p.detach(), opt


def assert_equals_twin(build, twin, precision=PRECISION):
    """`twin(W, gradients)` and the optimizer that `build(params)` makes end at the same weights, on all shapes and seeds."""
    for shape in SHAPES:
        for seed in SEEDS:
            W, gradients = problem(shape, seed)
            ours, _ = trained(build, W, gradients)
            theirs = twin(W, gradients)
            error = ((ours - theirs).norm() / theirs.norm()).item()
            assert error <= precision, f"{shape}, seed {seed}: {error:.2g}"
            assert not torch.equal(ours, W)


def spectral(S, h):
    """U h(s) V^T."""
    U, s, Vh = torch.linalg.svd(S, full_matrices=False)
    return U @ torch.diag(h(s)) @ Vh


def polar(S):
    return spectral(S, torch.ones_like)


def keller(W):
    return math.sqrt(max(1, W.shape[0] / W.shape[1]))


def mup(W):
    return math.sqrt(W.shape[0] / W.shape[1])


def adamw_rms(W):
    return 0.2 * math.sqrt(max(W.shape))
