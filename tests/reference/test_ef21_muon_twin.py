"""EF21-Muon against a literal twin: server and workers with X, W, G_srv, M_j and G_j written out (arXiv 2510.00643)."""

import pytest
import torch
from torch import nn

import schatten
from schatten.compressors import Identity, Natural, RankK, Sign, TopK
from schatten.presets.ef21_muon import EF21Muon
from tests.reference.twins import PRECISION, SEEDS, SHAPES, STEPS, adamw_rms, problem, spectral

LR, DECAY, BETA = 0.02, 0.3, 0.9

SENDERS = 2**20


def msign(S):
    """U V^T of the compact decomposition: what few entries or ranks have been sent is singular at first."""
    return spectral(S, lambda s: (s > 1e-12 * s.max()).to(s.dtype))


def compressed(C, X, step, sender):
    return C.decode(C.encode(X, step * SENDERS + sender), X.shape, X.dtype)


def twin(W, gradients, C, C_server):
    """`gradients[j][k]` is worker j's at step k."""
    N = len(gradients)
    X, server = W, torch.zeros_like(W)
    M, G = [torch.zeros_like(W)] * N, [torch.zeros_like(W)] * N
    for k in range(STEPS):
        R = []
        for j in range(N):
            M[j] = BETA * M[j] + (1 - BETA) * gradients[j][k]
            R.append(compressed(C, M[j] - G[j], k + 1, j))
            G[j] = G[j] + R[j]
        server = server + sum(R) / N
        X = (1 - LR * DECAY) * X - LR * adamw_rms(W) * msign(server)
        W = W + compressed(C_server, X - W, k + 1, SENDERS - 1)
    return W


def ours(W, gradients, C, C_server):
    p = nn.Parameter(W.clone())
    N = len(gradients)
    options = {"lr": LR, "weight_decay": DECAY, "momentum": BETA, "solver": schatten.solvers.svd()}
    opt = EF21Muon([p], compressor=C, server_compressor=C_server, workers=N, **options)
    for k in range(STEPS):
        for j in range(N):
            with opt.worker(j):
                p.grad = gradients[j][k].clone()
        opt.step()
    return p.detach()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("C", "C_server"),
    [
        (TopK(0.3), Identity()),
        (TopK(0.3), TopK(0.5)),
        (Natural(), Natural()),
        (Identity(), Sign()),
        (RankK(1), Identity()),
    ],
    ids=repr,
)
def test_workers_and_server_equal_the_equations(C, C_server, workers):
    for shape in SHAPES:
        for seed in SEEDS:
            W = problem(shape, seed)[0]
            gradients = [problem(shape, 10 * seed + j + 1)[1] for j in range(workers)]
            mine, theirs = ours(W, gradients, C, C_server), twin(W, gradients, C, C_server)
            error = ((mine - theirs).norm() / theirs.norm()).item()
            assert error <= PRECISION, f"{shape}, seed {seed}: {error:.2g}"
            assert not torch.equal(mine, W)
