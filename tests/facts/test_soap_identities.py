"""SOAP-Muon and KL-SOAP: what turns with the gradient, what does not see its scale, and where they are Adam."""

import pytest
import torch
from torch import nn

from schatten.presets.kl_soap import KLSOAP
from schatten.presets.soap_muon import EqualisedMomentum, SOAPMuon
from schatten.signals.eigenbasis import Eigenbasis
from schatten.solvers import svd


def soap(params, **options):
    return KLSOAP(params, statistics="gram", **options)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(build, start, gradients, **options):
    p = nn.Parameter(start.clone())
    opt = build([p], lr=0.1, **options)
    for G in gradients:
        p.grad = None if G is None else G.clone()
        opt.step()
    return p.detach(), opt.state[p]


@pytest.mark.parametrize("build", [SOAPMuon, KLSOAP, soap], ids=["SOAP-Muon", "KL-SOAP", "SOAP"])
def test_rotated_gradients_give_rotated_steps(build):
    start, gradients = draws(5, 5), draws(10, 5, 5, seed=1)
    U, V = (torch.linalg.qr(draws(5, 5, seed=seed))[0] for seed in (2, 3))
    options = {"solver": svd()} if build is SOAPMuon else {}
    W, _ = trained(build, start, gradients, **options)
    turned, _ = trained(build, U @ start @ V.mT, U @ gradients @ V.mT, **options)
    # Rounding, lifted by the smallest root mean square among 25 entries, some 1e-3 of the largest. In a fixed basis, such as
    # Adam's, the two are of the order of their steps apart.
    assert (turned - U @ W @ V.mT).norm() <= 1e-10 * W.norm()
    fixed, _ = trained(build, start, gradients, max_dim=0, **options)
    other, _ = trained(build, U @ start @ V.mT, U @ gradients @ V.mT, max_dim=0, **options)
    assert (other - U @ fixed @ V.mT).norm() >= 0.01 * W.norm()


@pytest.mark.parametrize("build", [SOAPMuon, KLSOAP, soap], ids=["SOAP-Muon", "KL-SOAP", "SOAP"])
@pytest.mark.parametrize("exponent", [-99, -66, 66, 99])
@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (1, 5)], ids=str)
def test_the_gradients_scale_is_not_seen(build, exponent, shape):
    # Powers of two, up to 6e29, round nothing: not a bit may differ. The square of 1e20 or 1e-20 is no number of fp32.
    start, gradients = draws(*shape, dtype=torch.float32), draws(6, *shape, seed=1, dtype=torch.float32)
    plain, _ = trained(build, start, gradients)
    scaled, _ = trained(build, start, gradients * 2.0**exponent)
    assert torch.equal(plain, scaled) and not torch.equal(plain, start)


@pytest.mark.parametrize("build", [SOAPMuon, KLSOAP, soap], ids=["SOAP-Muon", "KL-SOAP", "SOAP"])
def test_gradients_of_every_size_one_after_another_leave_everything_finite(build):
    G = draws(4, 6, seed=1, dtype=torch.float32)
    sizes = [0, 1, 1e30, 1e-30, 0, 1e-30, *[0] * 400, 1, 1e30]
    W, state = trained(build, draws(4, 6, dtype=torch.float32), [G * size for size in sizes])
    assert W.isfinite().all() and all(value.isfinite().all() for value in state.values())


def test_without_bases_soap_is_adam_from_the_second_step_on():
    start, gradients = draws(4, 3), draws(10, 4, 3, seed=1)
    first, _ = trained(KLSOAP, start, gradients[:1], weight_decay=0.0)
    ours, _ = trained(KLSOAP, start, gradients, weight_decay=0.0, max_dim=0, eps=0.0)
    adam = nn.Parameter(first.clone())
    opt = torch.optim.Adam([adam], lr=0.1, betas=(0.95, 0.9), eps=0.0)
    for G in gradients[1:]:
        adam.grad = G.clone()
        opt.step()
    torch.testing.assert_close(ours, adam.detach(), rtol=1e-12, atol=1e-12)


def test_the_first_step_of_a_matrix_is_muons():
    (G,) = draws(1, 5, 3)
    W, _ = trained(SOAPMuon, torch.zeros(5, 3, dtype=torch.float64), [G], weight_decay=0.0, scale="none", solver=svd())
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(W, -0.1 * U @ Vh, rtol=0, atol=1e-14)


def test_the_equalised_momentum_is_as_long_as_the_momentum():
    # msign does not see it, but another map in its place would.
    gradients, group = draws(5, 1, 1, 5, 3), {"momentum": 0.95, "beta2": 0.9}
    signal = EqualisedMomentum(nesterov=False)
    state = signal.init(gradients[0])
    for step, G in enumerate(gradients, start=1):
        counted = {**state, "step": torch.full((1, 1, 1, 1), float(step), dtype=torch.float64)}
        S, state = signal(G, counted, {**group, "step": step})
        assert S.norm() == pytest.approx(state["momentum_buffer"].norm().item(), rel=1e-12)


def test_a_matrix_that_starts_late_starts_from_the_identity():
    (G,) = draws(1, 4, 4)
    _, state = trained(SOAPMuon, torch.zeros(4, 4, dtype=torch.float64), [None, G])
    A = G @ G.mT
    Q, _ = torch.linalg.qr(A[:, A.diagonal().argsort(descending=True)])
    torch.testing.assert_close(state["left_basis"].abs(), Q.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_a_side_beyond_max_dim_keeps_no_average_and_no_basis(shape):
    _, state = trained(SOAPMuon, draws(*shape), draws(2, *shape, seed=1), max_dim=5)
    short = "left" if shape[0] == 4 else "right"
    assert {key for key in state if key.startswith(("left", "right"))} == {short, f"{short}_basis"}
    assert state[short].shape == (4, 4)


def test_kl_averages_settle_where_the_papers_recursion_settles():
    # Gradients A Z B, so that rows and columns have covariances of condition 100.
    m, n, beta = 4, 3, 0.99
    A, B = torch.logspace(0, -1, m, dtype=torch.float64).diag(), torch.logspace(-1, 0, n, dtype=torch.float64).diag()
    U, V = torch.linalg.qr(draws(m, m, seed=2))[0], torch.linalg.qr(draws(n, n, seed=3))[0]
    gradients = U @ A @ draws(8, m, n, seed=1) @ B @ V
    found = {}
    for statistics in ("kl", "gram"):
        basis = Eigenbasis(statistics, beta)
        state = basis.init(gradients[:1, None])
        for step in range(1, 1201):
            count = {"step": torch.full((1, 1, 1, 1), float(step), dtype=torch.float64)}
            state = {key: value.unsqueeze(0) if value.ndim == 3 else value for key, value in state.items()}
            _, state = basis(gradients[step % 8][None, None], {**state, **count}, {"step": step}, memory=0.9)
        found[statistics] = state["left"][0, 0], state["right"][0, 0]
    # The paper's fixed point, S_a = E[G S_b^-1 G^T] / n and S_b = E[G^T S_a^-1 G] / m, of these eight gradients.
    left = torch.eye(m, dtype=torch.float64)
    for _ in range(200):
        right = (gradients.mT @ torch.linalg.inv(left) @ gradients).mean(0) / m
        left = (gradients @ torch.linalg.inv(right) @ gradients.mT).mean(0) / n

    def distance(statistics):
        pairs = zip(found[statistics], (left, right), strict=True)
        return max((X / X.trace() - Y / Y.trace()).norm() / (Y / Y.trace()).norm() for X, Y in pairs)

    # An average with beta 0.99 sees the last of eight gradients 7 % more than the first, and 0.99^1200 = 6e-6 of the start.
    # Measured 0.007; Shampoo's averages are 0.21 away.
    assert distance("kl") < 0.02
    assert distance("gram") > 0.1
