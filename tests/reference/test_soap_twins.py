"""SOAP-Muon, KL-SOAP and SOAP against literal twins: averages, bases and moments of one fp64 matrix, written out."""

import functools

import pytest
import torch

from schatten import retractions, solvers
from schatten.presets.kl_soap import KLSOAP
from schatten.presets.soap_muon import SOAPMuon
from tests.reference.twins import assert_equals_twin, keller, polar, trained

# Entries of P that are 0 but for rounding, as in the null space that two 3 x 7 gradients leave, become 1e-16 / eps = 1e-10 of
# the others, where the harness' 1e-11 counts on 1e-16. Measured 1e-11.
PRECISION = 1e-9

LR, DECAY, EPS = 0.02, 0.3, 1e-6


def first_bases(build, W, G):
    """The optimizer's own eigenbases of G G^T and G^T G: in a null space, as of every rectangle, they are anyone's choice."""
    _, opt = trained(build, W, [G])
    (state,) = opt.state.values()
    bases = state["left_basis"], state["right_basis"]
    for Q, A in zip(bases, (G @ G.mT, G.mT @ G), strict=True):
        turned = Q.mT @ A @ Q
        assert torch.allclose(Q.mT @ Q, torch.eye(len(Q), dtype=Q.dtype), rtol=0, atol=1e-12)
        assert torch.allclose(turned, turned.diagonal().sort(descending=True).values.diag(), rtol=0, atol=1e-12 * A.norm())
    return bases


def refreshed(A, Q):
    order = torch.diagonal(Q.mT @ A @ Q).argsort(descending=True)
    return torch.linalg.qr(A @ Q[:, order])[0], order


def whitened(X, A, Q, t, statistics):
    """X H X^T, H the inverse of A's estimate in the basis Q, times A's mean eigenvalue."""
    if statistics == "gram" or t == 1:
        return X @ X.mT
    d = torch.diagonal(Q.mT @ A @ Q)
    a = d.mean()
    H = Q @ torch.diag(a / (d + a * max(0.9 ** (t - 1), 1e-4))) @ Q.mT
    return X @ H @ X.mT


def bases(gradients, first, statistics):
    """Q_L, Q_R and the order in which their columns were taken, for every step."""
    L = R = None
    QL, QR = first
    for t, G in enumerate(gradients, start=1):
        newL, newR = whitened(G, R, QR, t, statistics), whitened(G.mT, L, QL, t, statistics)
        if t == 1:
            L, R = newL, newR
            yield QL, QR, torch.arange(len(QL)), torch.arange(len(QR))
            continue
        L, R = 0.9 * L + 0.1 * newL, 0.9 * R + 0.1 * newR
        (QL, rows), (QR, columns) = refreshed(L, QL), refreshed(R, QR)
        yield QL, QR, rows, columns


def damped(v):
    return v.sqrt() + EPS * v.sqrt().norm()


def soap_muon_twin(W, gradients, *, build, nesterov):
    first = first_bases(build, W, gradients[0])
    M = v = torch.zeros_like(W)
    for t, (G, turn) in enumerate(zip(gradients, bases(gradients, first, "gram"), strict=True), start=1):
        QL, QR, rows, columns = turn
        M = 0.95 * M + 0.05 * G
        S = 0.05 * G + 0.95 * M if nesterov else M
        if t > 1:
            P = QL.mT @ S @ QR
            v = 0.9 * v[rows][:, columns] + 0.1 * P**2
            S = QL @ (P / damped(v)) @ QR.mT
        W = (1 - LR * DECAY) * W - LR * keller(W) * polar(S)
    return W


def adam_twin(W, gradients, *, build, statistics, fixed_norm):
    first, radius = first_bases(build, W, gradients[0]), W.norm()
    M = v = torch.zeros_like(W)
    for t, (G, turn) in enumerate(zip(gradients, bases(gradients, first, statistics), strict=True), start=1):
        QL, QR, rows, columns = turn
        if t == 1:
            D = G / G.norm() * min(W.shape) ** 0.5
        else:
            M = 0.95 * M + 0.05 * G
            v = 0.9 * v[rows][:, columns] + 0.1 * (QL.mT @ G @ QR) ** 2
            m = QL.mT @ M @ QR / (1 - 0.95 ** (t - 1))
            D = QL @ (m / damped(v / (1 - 0.9 ** (t - 1)))) @ QR.mT
        if fixed_norm:
            W = W - LR * radius * D / D.norm()
            W = radius * W / W.norm()
        else:
            W = (1 - LR * DECAY) * W - LR * D
    return W


@pytest.mark.parametrize("nesterov", [True, False])
def test_soap_muon_equals_its_formula(nesterov):
    def build(params):
        return SOAPMuon(params, lr=LR, weight_decay=DECAY, nesterov=nesterov, solver=solvers.svd())

    assert_equals_twin(build, functools.partial(soap_muon_twin, build=build, nesterov=nesterov), PRECISION)


@pytest.mark.parametrize("fixed_norm", [False, True], ids=["decay", "fixed norm"])
@pytest.mark.parametrize("statistics", ["kl", "gram"])
def test_kl_soap_and_soap_equal_their_formula(statistics, fixed_norm):
    decay = retractions.FixedNorm() if fixed_norm else "explicit"

    def build(params):
        return KLSOAP(params, lr=LR, weight_decay=DECAY, statistics=statistics, decay=decay)

    twin = functools.partial(adam_twin, build=build, statistics=statistics, fixed_norm=fixed_norm)
    assert_equals_twin(build, twin, PRECISION)
