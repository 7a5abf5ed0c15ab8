"""Dion, its orthonormal variant and Dion2 against literal twins, one column and one slice at a time."""

import functools
import math

import pytest
import torch

from schatten import solvers
from schatten.presets.dion import Dion
from schatten.presets.dion2 import Dion2
from tests.reference.twins import assert_equals_twin, mup, polar

LR, DECAY, MU = 0.02, 0.3, 0.95


def orthonormalised(X):
    """The columns of X by Gram and Schmidt, twice for fp64's sake: its QR factor with a positive diagonal."""
    columns = []
    for x in X.mT:
        for _ in range(2):
            for q in columns:
                x = x - (q @ x) * q
        columns.append(x / x.norm())
    return torch.stack(columns, dim=1)


def dion_twin(W, gradients, *, rank, variant):
    if W.shape[0] < W.shape[1]:
        factor = mup(W)
        return dion_steps(W.mT, gradients.mT, factor, rank, variant).mT
    return dion_steps(W, gradients, mup(W), rank, variant)


def dion_steps(W, gradients, factor, rank, variant):
    n = W.shape[1]
    Q = torch.eye(n, dtype=W.dtype)[:, : math.ceil(rank * n)]
    M = torch.zeros_like(W)
    for G in gradients:
        B = M + G
        P = orthonormalised(B @ Q)
        R = B.mT @ P
        M = B - (1 - MU) * P @ R.mT
        Q = orthonormalised(R) if variant == "orth" else R / R.norm(dim=0)
        W = (1 - LR * DECAY) * W - LR * factor * P @ Q.mT
    return W


def dion2_twin(W, gradients, *, fraction):
    by_rows = W.shape[0] <= W.shape[1]
    factor, W = mup(W), (W if by_rows else W.mT).clone()
    k = math.ceil(fraction * len(W))
    M = torch.zeros_like(W)
    for G in gradients:
        M = M + (G if by_rows else G.mT)
        chosen = M.abs().sum(dim=1).argsort(descending=True)[:k]
        D = polar(M[chosen])
        M[chosen] *= MU
        W = (1 - LR * DECAY) * W
        W[chosen] -= LR * factor * D
    return W if by_rows else W.mT


@pytest.mark.parametrize("rank", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("variant", ["dion", "orth"])
def test_dion_equals_its_formula(variant, rank):
    def build(params):
        return Dion(params, lr=LR, weight_decay=DECAY, rank=rank, variant=variant)

    assert_equals_twin(build, functools.partial(dion_twin, rank=rank, variant=variant))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_dion2_equals_its_formula(fraction):
    def build(params):
        return Dion2(params, lr=LR, weight_decay=DECAY, fraction=fraction, solver=solvers.svd())

    assert_equals_twin(build, functools.partial(dion2_twin, fraction=fraction))
