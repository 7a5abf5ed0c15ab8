"""How the tests of converters compare a library's next step with ours: exactly, both with the same orthogonaliser.

Not a test file.
"""

import copy

import torch
from torch import Tensor, nn

import schatten

SOLVER = schatten.solvers.svd()


def polar(X: Tensor, *_, **__) -> Tensor:
    """U V^T of the last two dimensions, in the place of a library's Newton-Schulz iteration."""
    return SOLVER(X)


def parameters(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(opt, params, steps):
    """Steps on gradients that depend on the step's number and the parameter's place alone."""
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i), dtype=torch.float64).to(
                p.dtype
            )
        opt.step()


def through_a_file(state_dict, tmp_path):
    """What torch.save and a safe torch.load leave of it."""
    torch.save(state_dict, tmp_path / "theirs.pt")
    return torch.load(tmp_path / "theirs.pt", weights_only=True)


def assert_same_next_steps(theirs, params, ours, own, tolerance=1e-12, steps=range(4, 8)):
    """Both optimizers take the same four steps from the same weights. fp64 leaves 1e-12 of rounding."""
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))
    before = copy.deepcopy(params)
    train(theirs, params, steps)
    train(ours, own, steps)
    for p, q, w in zip(params, own, before, strict=True):
        assert not torch.equal(p, w)
        assert (p - q).abs().max() <= tolerance * (p - w).abs().max()
