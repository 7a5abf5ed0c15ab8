"""Advice is the analytically right one on quadratics with known Hessians, and the measuring leaves no trace."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from schatten.diagnostics.noise_scale import micro_gradients, noise_scale
from schatten.lab import advise as advising
from schatten.lab.advice import CONDITION, NO, POWERS, UNDECIDED, YES
from schatten.lab.advise import TRIED
from schatten.lab.jackknife import jackknife, log_jackknife


def advise(model, losses, **options):
    """Of matrices that a plan would think too small, too."""
    return advising.advise(model, losses, rules=[(is_matrix, "spectral")], **options)


def is_matrix(name, module, parameter):
    return isinstance(module, nn.Linear) and parameter.ndim == 2 and "head" not in name


class Quadratic(nn.Module):
    """f(W) = <E, P E Q> / 2 + noise <N, E> with E = W - target: the Hessian P (x) Q, whatever the batch."""

    def __init__(self, P, Q, gradient, noise=0.0):
        super().__init__()
        m, n = gradient.shape
        self.layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
        self.P, self.Q, self.noise = P, Q, noise
        self.target = self.layer.weight.detach() - torch.linalg.solve(P, torch.linalg.solve(Q.mT, gradient.mT).mT)

    def loss(self, k=0):
        E = self.layer.weight - self.target
        N = torch.randn(E.shape, generator=torch.Generator().manual_seed(k), dtype=E.dtype)
        return (E * (self.P @ E @ self.Q)).sum() / 2 + self.noise * (N * E).sum()

    def losses(self, count=8):
        return [lambda k=k: self.loss(k) for k in range(count)]


def diagonal(*entries):
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def gain_and_step(G, P, Q, p):
    """<G, D>^2 / J and <G, D> / J by the explicit Hessian, D in the length of the default scale."""
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    D = U @ torch.diag(s**p) @ Vh
    D = D * (0.2 * math.sqrt(max(G.shape)) if p == 0 else 0.2 * math.sqrt(G.numel()) / D.norm())
    v = D.flatten()
    J = v @ torch.kron(P, Q.mT.contiguous()) @ v
    slope = (G * D).sum()
    return float(slope**2 / J), float(slope / J)


CURVED = diagonal(1, 2)  # with itself on both sides: curvature 1 at the first diagonal entry, 4 at the second


@pytest.mark.parametrize(
    ("gradient", "verdict", "power"),
    [
        (diagonal(0.5, 1.0), YES, 0.0),  # what is large is curved: 1.5^2/5 > 1.25^2/4.25
        (diagonal(1.0, 0.2), CONDITION, 1.0),  # 1.2^2/5 > 1.04/4, but < 1.04^2/1.16
        (diagonal(1.0, 0.05), NO, 1.0),  # 1.05^2/5 < 1.0025/4
    ],
)
def test_verdict_and_power_are_those_of_the_exact_gains(gradient, verdict, power):
    model = Quadratic(CURVED, CURVED, gradient)
    (row,) = advise(model, model.losses())
    gains = {p: gain_and_step(gradient, CURVED, CURVED, p)[0] for p in POWERS}
    assert row.verdict == verdict
    assert row.power == power == max(gains, key=gains.get)
    assert row.best.value == pytest.approx(gains[0.0] / gains[1.0], rel=1e-10)
    safe = gains[0.0] / (float(gradient.square().sum()) / 4)
    assert row.safe.value == pytest.approx(safe, rel=1e-10)
    assert row.smoothness.value == pytest.approx(4, rel=1e-10)


def test_steps_gains_and_decay_are_those_of_an_explicit_kronecker_hessian():
    P, Q = (torch.randn(n, n, dtype=torch.float64) for n in (5, 7))
    P, Q, G = P @ P.mT, Q @ Q.mT, torch.randn(5, 7, dtype=torch.float64)
    model = Quadratic(P, Q, G)
    advised = advise(model, model.losses(), iterations=35, radius=0.5)
    (row,) = advised
    for p in POWERS:
        gain, step = gain_and_step(G, P, Q, p)
        assert row.slopes[p].value / row.curvatures[p].value == pytest.approx(step, rel=1e-8)
        assert row.slopes[p].value ** 2 / row.curvatures[p].value == pytest.approx(gain, rel=1e-8)
    step = gain_and_step(G, P, Q, 0.0)[1]
    assert row.lr.value == advised.alone == pytest.approx(step, rel=1e-8)
    # One matrix is all of the model, and a quadratic does what is predicted.
    assert advised.joint.value == pytest.approx(step, rel=1e-8)
    for times, trial in zip(TRIED, advised.trials, strict=True):
        assert trial.lr == pytest.approx(times * step, rel=1e-8)
        assert trial.change.value == pytest.approx(trial.predicted, rel=1e-6, abs=1e-9)
    assert advised.lr == pytest.approx(step, rel=1e-8)
    assert row.smoothness.value == pytest.approx(float(torch.linalg.matrix_norm(torch.kron(P, Q), 2)), rel=1e-8)
    assert row.factor == pytest.approx(0.2 * math.sqrt(7))
    assert row.norm == pytest.approx(float(torch.linalg.matrix_norm(model.layer.weight.detach(), 2)))
    assert row.weight_decay == advised.weight_decay == pytest.approx(row.factor / 0.5)
    # Nothing differs between batches.
    assert row.lr.high - row.lr.low < 1e-8 * row.lr.value
    assert advised.noise == pytest.approx(0, abs=1e-8)


class Two(nn.Module):
    """Two matrices of curvature 1 whose interaction has strength k: loss (|A|^2 + |B|^2)/2 + k <A, B> of their errors."""

    def __init__(self, k):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, bias=False, dtype=torch.float64) for _ in range(2))
        self.k = k
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.copy_(torch.eye(3))

    def loss(self):
        A, B = self.a.weight, self.b.weight
        return (A.square().sum() + B.square().sum()) / 2 + self.k * (A * B).sum()


def test_the_joint_step_counts_what_matrices_do_to_each_other():
    model = Two(0.5)
    advised = advise(model, [model.loss] * 8)
    c = 0.2 * math.sqrt(3)
    # G = 1.5 I and D = c I in each: alone 4.5 c / 3 c^2; together 9 c over (3 + 3 + 2 * 0.5 * 3) c^2.
    assert [row.lr.value for row in advised] == pytest.approx([1.5 / c, 1.5 / c])
    assert advised.joint.value == pytest.approx(1 / c)
    assert advised.trials[TRIED.index(1.0)].change.value == pytest.approx(-4.5)


def test_the_joint_step_of_independent_matrices_is_each_ones_own():
    model = Two(0.0)
    advised = advise(model, [model.loss] * 8)
    assert advised.joint.value == pytest.approx(advised.alone)


def test_noise_that_hides_the_gradient_leaves_everything_undecided():
    model = Quadratic(CURVED, CURVED, 1e-3 * diagonal(0.5, 1.0), noise=1.0)
    advised = advise(model, model.losses(16))
    (row,) = advised
    assert (row.verdict, row.power, row.lr, advised.lr) == (UNDECIDED, None, None, None)


def test_the_noise_is_that_of_the_diagnostic_without_keeping_all_gradients():
    model = Quadratic(CURVED, CURVED, diagonal(0.5, 1.0), noise=0.5)
    gradients = micro_gradients(model.losses(), [model.layer.weight])
    assert advise(model, model.losses()).noise == pytest.approx(float(noise_scale(gradients).scale.value), rel=1e-10)


def test_batches_are_compared_with_others_so_that_noise_alone_shows_no_descent():
    """A direction judged on its own batch would have slope |N|_* > 0 in every draw."""
    model = Quadratic(
        torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64), torch.zeros(6, 6).double(), noise=1.0
    )
    (row,) = advise(model, model.losses(40))
    slope = row.slopes[0.0]
    assert slope.low < 0 < slope.high
    own = 0.2 * math.sqrt(6) * 6  # at least ||N||_F >= about 6 times the factor
    assert abs(slope.value) < 0.3 * own
    (fooled,) = advise(model, [loss for loss in model.losses(20) for _ in range(2)])
    assert fooled.slopes[0.0].low > 0.9 * own


def test_moderate_noise_gives_intervals_that_hold_the_exact_numbers():
    gradient, exact, inside = diagonal(0.5, 1.0), _expected_slope(), 0
    for trial in range(40):
        model = Quadratic(CURVED, CURVED, gradient, noise=0.1)
        losses = [lambda k=k, model=model: model.loss(k) for k in range(1000 * trial, 1000 * trial + 8)]
        (row,) = advise(model, losses, iterations=4)
        inside += row.slopes[1.0].low <= exact <= row.slopes[1.0].high
        # What noise does to a gradient step it does to what is sure of it; the corrections for bias differ a little.
        assert row.best is None or row.safe is None or row.best.value <= 1.01 * row.safe.value
    # 40 intervals of 95 %: 34 or more with probability 0.995, and Student's t of 3 degrees needs nearly normal draws.
    assert inside >= 34


def _expected_slope():
    """Mean over many noisy gradients of <G, D_1>, D_1 the gradient with root mean square 0.2."""
    G = diagonal(0.5, 1.0)
    noisy = G + 0.1 * torch.randn(200_000, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    D = noisy * (0.2 * 2 / torch.linalg.matrix_norm(noisy))[:, None, None]
    return float((G * D).sum((1, 2)).mean())


def test_the_jackknife_holds_a_ratio_of_means_19_times_in_20():
    g = torch.Generator().manual_seed(0)
    count = 1000
    inside = 0
    for _ in range(count):
        draws = torch.randn(8, 2, generator=g, dtype=torch.float64) * torch.tensor([0.3, 0.2]) + torch.tensor([2.0, 1.0])
        found = log_jackknife(draws, lambda e: e[..., 0] / e[..., 1])
        inside += found.low <= 2.0 <= found.high
    # 950 +- 3 sqrt(1000 * 0.95 * 0.05) = 21; the ratio is not exactly normal.
    assert 925 <= inside <= 975


def test_squares_of_means_are_without_bias():
    g = torch.Generator().manual_seed(0)
    draws = 1 + torch.randn(4000, 4, 1, generator=g, dtype=torch.float64)
    values = torch.tensor([jackknife(d, lambda e: e[..., 0].square()).value for d in draws])
    # Plain squares of means of four would be 1.25.
    assert float(values.mean()) == pytest.approx(1, abs=4 * float(values.std()) / math.sqrt(len(values)))


class Noticing(nn.Module):
    """Everything that could remember an evaluation: dropout, batch norm, a head, an unused matrix, a frozen one."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.up, self.unused, self.frozen = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 16)
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.3)
        self.down, self.head = nn.Linear(16, 8), nn.Linear(8, 11)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        x = self.dropout(torch.tanh(self.norm(self.up(self.tokens(ids)))))
        return nn.functional.cross_entropy(self.head(self.down(self.frozen(x))), ids)


def test_the_model_and_all_generators_are_bit_for_bit_as_before():
    model = Noticing()
    ids = [torch.randint(0, 11, (32,)) for _ in range(8)]
    model(ids[0]).backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    advised = advise(model, [lambda x=x: model(x) for x in ids])
    assert advised.joint is not None and advised.trials, "the part that moves weights has not run"
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate() and (generators[2] == np.random.get_state()[1]).all()
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    for name, p in model.named_parameters():
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name]), name
    assert [row.name for row in advised] == ["up.weight", "unused.weight", "down.weight"]
    assert advised.matrices[1].verdict == UNDECIDED


def test_weights_are_put_back_when_a_loss_fails_in_a_trial():
    model = Quadratic(CURVED, CURVED, diagonal(0.5, 1.0))
    before = model.layer.weight.detach().clone()

    def fails_elsewhere():
        if not torch.equal(model.layer.weight, before):
            raise RuntimeError("moved")
        return model.loss()

    with pytest.raises(RuntimeError, match="moved"):
        advise(model, [fails_elsewhere] * 8)
    assert torch.equal(model.layer.weight, before)


def test_fused_projections_are_separate_matrices():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(4, 12, bias=False)
            self.out = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return (self.out(torch.tanh(q * k + v)) - x).square().mean()

    model = Fused()
    batches = [torch.randn(20, 4) for _ in range(8)]
    losses = [lambda x=x: model(x) for x in batches]
    advised = advise(model, losses)
    assert [(row.name, row.shape) for row in advised][:3] == [(f"qkv.weight[{i}]", (4, 4)) for i in range(3)]
    assert len(advised) == 4
    assert [row.name for row in advise(model, losses, only="out*")] == ["out.weight"]


def test_what_gives_no_advice_is_refused():
    model = Quadratic(CURVED, CURVED, diagonal(0.5, 1.0))
    with pytest.raises(ValueError, match="even number of at least 8"):
        advise(model, model.losses(7))
    with pytest.raises(ValueError, match="radius must be positive"):
        advise(model, model.losses(), radius=0.0)
    with pytest.raises(ValueError, match="No matrix of this model is named 'x'"):
        advise(model, model.losses(), only="x")
    with pytest.raises(ValueError, match="not finite"):
        advise(model, [lambda: model.loss() * math.nan] * 8)
