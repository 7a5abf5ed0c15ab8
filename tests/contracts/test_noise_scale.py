"""The gradient-noise scale: unbiased parts, error bars that hold the truth, and a training that notices nothing."""

import math

import pytest
import torch
from torch import nn

from schatten.diagnostics.core import Quantity, Whole
from schatten.diagnostics.hessian import Hessian
from schatten.diagnostics.noise_scale import Noise, micro_gradients, noise_scale, nuclear_noise
from schatten.solvers import svd
from tests.contracts import noise_draws as law


@pytest.mark.parametrize(("n", "batch_size", "snr"), [(6, 1, 2.0), (12, 4, 0.5), (24, 8, 0.2)])
def test_error_bars_hold_the_truth_19_times_in_20(n, batch_size, snr):
    law.errors_hold(noise_scale, n, batch_size, snr)


@pytest.mark.parametrize("n", [3, 8])
def test_noise_and_signal_are_unbiased(n):
    law.parts_are_unbiased(noise_scale, n)


def test_the_estimates_are_those_of_a_small_and_a_large_batch():
    """Appendix A.1 of arXiv 1812.06162: of |g|^2 at two batch sizes, here one micro-batch and all n."""
    ((one,), _, _, _), n, b = law.draws(5, 4, 0.5, trials=1), 5, 4
    flat = torch.stack([torch.cat([t.flatten() for t in g]) for g in one])
    small, large = flat.square().sum(-1).mean(), flat.mean(0).square().sum()
    found = noise_scale(one, b)
    assert float(found.signal.value) == pytest.approx(float((n * b * large - b * small) / (n * b - b)))
    assert float(found.noise.value) == pytest.approx(float((small - large) / (1 / b - 1 / (n * b))))
    assert float(found.scale.value) == pytest.approx(float(found.noise.value / found.signal.value))


def test_the_jackknife_is_what_leaving_out_each_micro_batch_gives():
    (one,), _, _, _ = law.draws(40, 4, 2.0, trials=1)
    found = noise_scale(one, 4)
    left = [noise_scale(one[:i] + one[i + 1 :], 4) for i in range(40)]
    for of in ("noise", "signal", "scale"):
        values = torch.stack([getattr(part, of).value for part in left])
        error = math.sqrt(39 / 40 * float((values - values.mean()).square().sum()))
        # For 40 micro-batches errors are widened by 3 %.
        assert 1 < float(getattr(found, of).error) / error < 1.04


def test_drowned_gradients_have_an_infinite_scale_and_equal_ones_none():
    noise = [[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 0.0])], [torch.tensor([0.0, 1.0])]]
    found = noise_scale(noise)
    assert float(found.signal.value) <= 0
    assert math.isinf(float(found.scale.value)) and math.isinf(float(found.scale.error))
    same = noise_scale([[torch.tensor([1.0, 2.0])]] * 4)
    assert float(same.scale.value) == float(same.noise.value) == 0
    assert float(same.signal.value) == pytest.approx(5)


def test_a_gradient_that_is_not_finite_makes_everything_nan():
    gradients = [[torch.tensor([1.0, math.nan if i == 1 else float(i)])] for i in range(4)]
    for estimate in noise_scale(gradients):
        assert math.isnan(float(estimate.value))
    for estimate in nuclear_noise([[g[0].reshape(1, 2)] for g in gradients]):
        assert math.isnan(float(estimate.value))


def test_the_scale_of_large_and_small_gradients_is_the_same():
    (one,), _, _, _ = law.draws(8, 4, 1.0, trials=1)
    plain = noise_scale(one, 4).scale
    for c in (1e-15, 1e15):
        scaled = noise_scale([[c * t for t in g] for g in one], 4).scale
        torch.testing.assert_close(scaled.value, plain.value)
        torch.testing.assert_close(scaled.error, plain.error)


def test_with_a_hessian_the_scale_is_that_of_its_quadratic_form():
    """B_noise = tr(H Sigma) / G^T H G, here of f_i(w) = (w - c_i)^T H (w - c_i) / 2 with a known H."""
    A = torch.randn(6, 6, dtype=torch.float64)
    H = A @ A.mT
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    centres = torch.randn(8, 6, dtype=torch.float64)
    losses = [lambda c=c: (w - c) @ H @ (w - c) / 2 for c in centres]
    gradients = micro_gradients(losses, [w])
    found = noise_scale(gradients, product=Hessian(losses, [w]))
    g = torch.stack([one[0] for one in gradients])
    deviations = g - g.mean(0)
    noise = torch.einsum("ij,jk,ik", deviations, H, deviations) / 7
    signal = g.mean(0) @ H @ g.mean(0) - noise / 8
    assert float(found.noise.value) == pytest.approx(float(noise))
    assert float(found.signal.value) == pytest.approx(float(signal))
    # Of H = c I it is the simple one.
    plain, same = noise_scale(gradients), noise_scale(gradients, product=lambda v: [3 * t for t in v])
    assert float(same.scale.value) == pytest.approx(float(plain.scale.value))


def test_real_losses_of_drawn_samples_have_the_scale_of_their_population():
    """The whole way: per-sample gradients of a regression are known, micro-batches are drawn from the samples."""
    X, y = torch.randn(60, 5), torch.randn(60)
    w = torch.zeros(5, requires_grad=True)
    each = -(y[:, None] * X).double()
    G, truth = each.mean(0), float((each - each.mean(0)).square().sum(-1).mean())
    found = []
    for _ in range(200):
        draws = torch.randint(0, 60, (16, 8))
        gradients = micro_gradients([lambda i=i: ((X[i] @ w - y[i]) ** 2).mean() / 2 for i in draws], [w])
        found.append(noise_scale(gradients, 8))
    # 200 draws of a coverage of 0.95 have a standard deviation of 1.5 %: four of them below, all above.
    assert law.held([one.noise for one in found], truth) >= 0.89
    assert law.held([one.signal for one in found], float(G @ G)) >= 0.89
    assert sum(float(one.noise.value) for one in found) / 200 == pytest.approx(truth, rel=0.05)


# -- the nuclear norm --------------------------------------------------------------------------------------------------


def test_the_nuclear_noise_and_its_bounds_hold_the_truth():
    trials, shapes = 150, ((6, 6), (4, 8))
    gradients, G, _, _ = law.draws(10, 4, 1.0, shapes=shapes, trials=trials)
    found = [nuclear_noise(one, 4, solver=svd()) for one in gradients]
    many, _, _, _ = law.draws(20, 1, 1.0, shapes=shapes, trials=200, seed=1)
    centre = law.draws(1, 1, 1.0, shapes=shapes, trials=1, seed=1)[1]
    parts = [part.unflatten(0, s) for part, s in zip(centre.split([36, 32]), shapes, strict=True)]
    norms = sum(
        torch.linalg.svdvals(torch.stack([g[k] - parts[k] for one in many for g in one])).sum(-1) for k in range(len(shapes))
    )
    noise = float(norms.square().mean())  # of one sample, by 4000 draws: right to 0.3 %
    true = [part.unflatten(0, s) for part, s in zip(G.split([36, 32]), shapes, strict=True)]
    nuclear = float(sum(torch.linalg.svdvals(part).sum() for part in true))
    # 150 draws of 0.95: a standard deviation of 1.8 %.
    assert 0.88 <= law.held([one.noise for one in found], noise) <= 1
    lower, upper = (torch.stack([getattr(one, of).value for one in found]) for of in ("lower", "upper"))
    assert float(lower.mean()) < nuclear < float(upper.mean())
    low, high = zip(*(one.scale for one in found), strict=True)
    assert float(torch.stack(low).mean()) < noise / nuclear**2 < float(torch.stack(high).mean())
    # The bounds' own errors: how far another draw falls.
    for of, values in (("lower", lower), ("upper", upper)):
        mean = float(torch.stack([getattr(one, of).error for one in found]).mean())
        assert 0.8 < mean / float(values.std()) < 1.6, of


def test_the_bounds_of_the_nuclear_norm_close_as_noise_goes_and_it_is_summed_over_matrices():
    A, B = torch.randn(2, 4, 3), torch.randn(5, 5)
    found = nuclear_noise([[A, B]] * 3)
    norm = float(torch.linalg.svdvals(A).sum() + torch.linalg.svdvals(B).sum())
    # One msgn is right to 0.2 %.
    assert float(found.lower.value) == pytest.approx(norm, rel=2e-3)
    assert float(found.upper.value) == pytest.approx(norm, rel=2e-3)
    # fp32's rounding of the mean is all the noise there is.
    assert max(float(end) for end in found.scale) < 1e-12


def test_a_vector_has_no_nuclear_norm():
    with pytest.raises(ValueError, match="needs matrices"):
        nuclear_noise([[torch.ones(3)]] * 3)


# -- use ---------------------------------------------------------------------------------------------------------------


def test_measuring_changes_nothing_and_draws_dropout_anew_for_each_micro_batch():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    x = torch.randn(16, 6)
    kept = [t.clone() for t in (*net.parameters(), *(p.grad for p in net.parameters()), *net.buffers())]
    state = torch.get_rng_state()
    gradients = micro_gradients([lambda: net(x).square().mean()] * 3, list(net.parameters()), model=net)
    again = micro_gradients([lambda: net(x).square().mean()] * 3, list(net.parameters()), model=net)
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(kept, (*net.parameters(), *(p.grad for p in net.parameters()), *net.buffers()), strict=True):
        assert torch.equal(old, new)
    assert not torch.equal(gradients[0][0], gradients[1][0])
    for one, two in zip(gradients, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_noise_quantity_is_that_of_the_model_and_of_each_parameter():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(7, 16, 6)
    losses = [lambda i=i: (net(x[i]) - x[i, :, :1]).square().mean() for i in range(7)]
    quantity, parameters = Noise(batch_size=16), dict(net.named_parameters())
    found = quantity(Whole(parameters, (), losses))
    gradients = micro_gradients(losses, list(parameters.values()))
    total = noise_scale(gradients, 16)
    assert isinstance(quantity, Quantity) and set(found) == set(quantity.columns)
    for of in ("noise", "signal", "scale"):
        assert float(found[of]) == pytest.approx(float(getattr(total, of).value))
        assert float(found[f"{of}_error"]) == pytest.approx(float(getattr(total, of).error))
    for i in range(4):
        own = noise_scale([[g[i]] for g in gradients], 16).scale
        assert float(found["scales"][i]) == pytest.approx(float(own.value))
        assert float(found["scales_error"][i]) == pytest.approx(float(own.error))


@pytest.mark.parametrize(
    ("gradients", "batch_size", "message"),
    [
        ([[torch.ones(2)]] * 2, 1, "at least 3 micro-batches"),
        ([[torch.ones(2)]] * 3, 0, "batch_size must be the number of samples"),
        ([[torch.ones(2)], [torch.ones(3)], [torch.ones(2)]], 1, "of the same parameters"),
        ([[], [], []], 1, "of the same parameters"),
    ],
)
def test_gradients_that_have_no_noise_scale_are_refused(gradients, batch_size, message):
    for estimate in (noise_scale, nuclear_noise):
        with pytest.raises(ValueError, match=message):
            estimate(gradients, batch_size)


def test_nothing_waits_for_the_device():
    # A meta tensor has no numbers to ask for.
    gradients = [[torch.empty(4, 5, device="meta")] for _ in range(4)]
    for estimate in (*noise_scale(gradients), *nuclear_noise(gradients)):
        assert estimate.value.device.type == estimate.error.device.type == "meta"
