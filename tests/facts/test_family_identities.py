"""Where the literature says that two optimizers are one, they are: members of Lion-K, ends of the powers, special cases."""

import pytest
import torch
from torch import nn

import schatten
from schatten import maps
from tests.reference.twins import SHAPES, problem, trained

SVD = schatten.solvers.svd()

MU = 0.9


def largest_difference(a, b):
    """Over shapes, relative to the weights, after 30 steps of two optimizers on the same gradients."""
    worst = 0.0
    for shape in SHAPES:
        W, gradients = problem(shape)
        ours, theirs = trained(a, W, gradients)[0], trained(b, W, gradients)[0]
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


# The same numbers by other operations, in fp64 over 30 steps; see `twins.PRECISION`.
SAME = 1e-11

COMMON = {"lr": 0.03, "weight_decay": 0.2}

IDENTITIES = {
    "mSGDZ is Muon of the momentum sum": (
        lambda p: schatten.SpectralSGD(p, 0, momentum=MU, solver=SVD, **COMMON),
        lambda p: schatten.Muon(p, momentum=MU, nesterov=False, form="sum", scale="keller", solver=SVD, **COMMON),
    ),
    "mSGD is torch's SGD with decoupled decay": (
        lambda p: schatten.SpectralSGD(p, 1, lr=0.03, momentum=MU),
        lambda p: torch.optim.SGD(p, lr=0.03, momentum=MU),
    ),
    "Adam is torch's AdamW": (
        lambda p: schatten.SpectralAdam(p, 1, betas=(0.9, 0.95), **COMMON),
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.95), **COMMON),
    ),
    "Lion-K of the nuclear norm with (mu^2, mu) is Muon with Nesterov": (
        lambda p: schatten.LionK(p, maps.Nuclear(SVD), betas=(MU**2, MU), **COMMON),
        lambda p: schatten.Muon(p, momentum=MU, scale="none", decay="implicit", solver=SVD, **COMMON),
    ),
    "Lion-K of the nuclear norm with (mu, mu) is Muon without": (
        lambda p: schatten.LionK(p, maps.Nuclear(SVD), betas=(MU, MU), **COMMON),
        lambda p: schatten.Muon(p, momentum=MU, nesterov=False, scale="none", decay="implicit", solver=SVD, **COMMON),
    ),
    "the site's (b_n, b_p) is the paper's (b_n b_p, b_p)": (
        lambda p: schatten.LionK(p, maps.Huber(0.2, solver=SVD), betas=(0.8, MU), form="site", **COMMON),
        lambda p: schatten.LionK(p, maps.Huber(0.2, solver=SVD), betas=(0.8 * MU, MU), form="paper", **COMMON),
    ),
    "Lion-K of the l1 norm is Lion": (
        lambda p: schatten.LionK(p, maps.L1(), betas=(0.85, 0.95), decay="explicit", **COMMON),
        lambda p: schatten.Lion(p, betas=(0.85, 0.95), **COMMON),
    ),
    "Lion-K of half the squared Frobenius norm is SGD with dampened momentum": (
        lambda p: schatten.LionK(p, maps.Power(1, over="entries"), lr=0.03, weight_decay=0.0, betas=(0.0, 0.0)),
        lambda p: torch.optim.SGD(p, lr=0.03),
    ),
    "Schatten-2 is normalised SGD": (
        lambda p: schatten.LionK(p, maps.Schatten(2.0, solver=SVD), betas=(MU, MU), **COMMON),
        lambda p: schatten.LionK(p, maps.Frobenius(), betas=(MU, MU), **COMMON),
    ),
    "Scion is decayed Muon with lr rho and decay 1 / rho": (
        lambda p: schatten.Scion(p, lr=0.01, momentum=MU, radius=4.0, solver=SVD),
        lambda p: schatten.Muon(p, lr=0.04, weight_decay=0.25, momentum=MU, nesterov=False, scale="mup", solver=SVD),
    ),
    "the whole Ky Fan norm is Muon": (
        lambda p: schatten.Fanion(p, 7, momentum=MU, **COMMON),
        lambda p: schatten.Muon(p, momentum=MU, scale="keller", solver=SVD, **COMMON),
    ),
    "Fanion-1 is Neon": (
        lambda p: schatten.Fanion(p, 1, momentum=MU, **COMMON),
        lambda p: schatten.Neon(p, momentum=MU, **COMMON),
    ),
    "F-Fanion-r is F-Muon": (
        lambda p: schatten.Fanion(p, 7, alpha=0.5, momentum=MU, **COMMON),
        lambda p: schatten.FMuon(p, momentum=MU, solver=SVD, **COMMON),
    ),
    "MVR without correction is Muon without Nesterov": (
        lambda p: schatten.MuonMVR(p, gamma=0.0, clip=False, momentum=MU, solver=SVD, **COMMON),
        lambda p: schatten.Muon(p, momentum=MU, nesterov=False, solver=SVD, **COMMON),
    ),
    "MARS-M is MVR1 without clip": (
        lambda p: schatten.MARSM(p, momentum=MU, solver=SVD, **COMMON),
        lambda p: schatten.MuonMVR(p, momentum=MU, clip=False, solver=SVD, **COMMON),
    ),
    "simplified Muon at constant steps is Muon without momentum": (
        lambda p: schatten.SimplifiedMuon(p, adaptive=False, **COMMON),
        lambda p: schatten.Muon(p, momentum=0.0, scale="none", solver=SVD, **COMMON),
    ),
    "the trust region without composite term is Muon without decay": (
        lambda p: schatten.TrustRegion(p, lr=0.03, momentum=MU, norm=maps.Nuclear(SVD)),
        lambda p: schatten.Muon(p, lr=0.03, weight_decay=0.0, momentum=MU, nesterov=False, solver=SVD),
    ),
}

# Krylov spaces find leading vectors to 1e-8 at the smallest gaps here; AdamW of torch's is a fused kernel of its own.
TOLERANCES = {"Fanion-1 is Neon": 0.0, "the whole Ky Fan norm is Muon": 1e-8, "F-Fanion-r is F-Muon": 1e-8}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    a, b = IDENTITIES[name]
    assert largest_difference(a, b) <= TOLERANCES.get(name, SAME)


def test_the_identities_can_fail():
    a = lambda p: schatten.Muon(p, momentum=MU, solver=SVD, **COMMON)  # noqa: E731
    b = lambda p: schatten.Muon(p, momentum=MU, nesterov=False, solver=SVD, **COMMON)  # noqa: E731
    assert largest_difference(a, b) > 0.01


def test_powers_tend_to_muon_as_p_tends_to_zero():
    muon = lambda params: schatten.SpectralSGD(params, 0.0, lr=0.01, solver=SVD)  # noqa: E731
    distances = []
    for p in (0.3, 0.1, 0.01, 1e-4):
        # Without the shape factor, which only p = 0 has: square matrices.
        W, gradients = problem((4, 4))
        a = trained(lambda params, p=p: schatten.SpectralSGD(params, p, lr=0.01, solver=SVD), W, gradients)[0]
        distances.append(float((a - trained(muon, W, gradients)[0]).norm()))
    assert distances == sorted(distances, reverse=True)
    # s^p - 1 is p log s: the distance falls with p.
    assert distances[-1] == pytest.approx(distances[-2] / 100, rel=0.05)


def test_huber_tends_to_sgd_for_large_a():
    W, gradients = problem((5, 3))
    sgd = trained(lambda params: schatten.SpectralSGD(params, 1, lr=0.01, momentum=MU), W, gradients)[0]
    for a in (1e3, 1e6):
        rule = schatten.Rule(schatten.signals.Momentum("sum", nesterov=False), maps.Huber(a, solver=SVD))
        rule = schatten.Rule(rule.signal, rule.map, schatten.scales.Scale("none"))
        huber = trained(
            lambda params, rule=rule, a=a: schatten.SpectralOptimizer(params, rule, lr=0.01 * a, momentum=MU), W, gradients
        )[0]
        # Below its threshold Huber's function is s / a itself.
        assert (huber - sgd).norm() <= SAME * sgd.norm()


def test_mvr_with_gamma_one_and_no_clip_is_storm():
    """M <- G + beta (M - G'), G' the gradient of this sample at the previous weights."""
    beta, lr = 0.9, 0.02
    W, targets = problem((5, 3))
    p = nn.Parameter(W.clone())
    opt = schatten.MuonMVR(
        [p], lr=lr, weight_decay=0.0, momentum=beta, gamma=1.0, clip=False, exact=True, scale="none", solver=SVD
    )
    gradient = lambda X, target: X - target + X**3  # noqa: E731
    M, old = (1 - beta) * gradient(W, targets[0]), W
    for t, target in enumerate(targets):

        def closure(target=target):
            opt.zero_grad()
            loss = ((p - target) ** 2).sum() / 2 + (p**4).sum() / 4
            loss.backward()
            return loss

        opt.step(closure)
        if t > 0:
            M = gradient(W, target) + beta * (M - gradient(old, target))
        old, W = W, W - lr * SVD(M)
        assert torch.allclose(opt.state[p]["momentum_buffer"], M, atol=1e-9)
    assert torch.allclose(p, W, atol=1e-9)


@pytest.mark.parametrize("lr", [0.1, 1e-3])
def test_lion_ends_in_its_exact_two_cycle_under_constants(lr):
    """On theta^2 / 2, theta = +-lr / 2 and M = -+lr (1 - beta2) / (2 (1 + beta2)) repeat for ever (arXiv 2411.07724)."""
    beta2 = 0.99
    theta = nn.Parameter(torch.tensor([lr / 2], dtype=torch.float64))
    opt = schatten.Lion([theta], lr=lr, betas=(0.9, beta2))
    opt.state[theta]["momentum_buffer"].fill_(-lr * (1 - beta2) / (2 * (1 + beta2)))
    for step in range(1, 101):
        theta.grad = theta.detach().clone()
        opt.step()
        sign = 1 if step % 2 == 0 else -1
        assert theta.item() == pytest.approx(sign * lr / 2, rel=1e-12)
        assert opt.state[theta]["momentum_buffer"].item() == pytest.approx(-sign * lr / 398, rel=1e-9)


def test_simplified_muon_with_one_over_l_decreases_by_what_the_theory_says():
    """f = 1/2 tr(W^T Q W) has L_sp = nuc(Q), and lr = 1 / L_sp takes at least ||G||_*^2 / (2 L_sp) (arXiv 2505.23737)."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    Q = root @ root.mT
    L = float(Q.trace())
    W = nn.Parameter(torch.randn(6, 9, generator=generator, dtype=torch.float64))
    opt = schatten.SimplifiedMuon([W], lr=1 / L)
    f = lambda: 0.5 * (W.mT @ Q @ W).trace()  # noqa: E731
    for _ in range(50):
        opt.zero_grad()
        before = f()
        before.backward()
        nuclear = torch.linalg.svdvals(W.grad).sum()
        opt.step()
        assert before - f() >= nuclear**2 / (2 * L) * (1 - 1e-9)
