"""torch.optim.Muon 2.13.0 (peers.md 1.1): each of its defects, as something no preset does."""

import pytest
import torch
from torch import nn

import schatten
from schatten import presets
from tests.peer_bugs.helpers import (
    SOLVERS,
    Opt,
    P,
    assert_caught,
    assert_solver_caught,
    cos,
    decaying,
    exact,
    gaussian,
    raises,
    relative,
    solver_of,
    step,
)

# Their update is as long as the gradient, by definition (`schatten.PolarGrad`, `schatten.SimplifiedMuon`), or divides by
# Adam's root of squares plus eps, with Adam's range.
GRADIENT_SIZED = (schatten.PolarGrad, schatten.SimplifiedMuon, schatten.SpectralAdam)


def bf16_weights_keep_the_momentum_of_fp32_weights(optimizer):
    buffers = []
    for dtype in (torch.bfloat16, torch.float32):
        p = P(12, 8, dtype=torch.bfloat16)
        p = nn.Parameter(p.detach().to(dtype))
        opt = Opt([p], optimizer)
        for g in gaussian(3, 12, 8, seed=1) * 100:
            step(opt, p, g.bfloat16().to(dtype))
        buffers.append([v.float() for v in opt.state[p].values() if v.shape == p.shape])
    for low, full in zip(*buffers, strict=True):
        assert relative(low, full) < 0.02


def test_momentum_of_bf16_weights_is_that_of_fp32_weights(preset):
    bf16_weights_keep_the_momentum_of_fp32_weights(preset)


def test_a_zero_order_estimate_at_bf16_weights_is_no_rounding_error():
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    opt = schatten.JaguarMuon([p])
    opt.step(lambda: p.double().sum())
    (momentum,) = (s["momentum_buffer"] for s in opt.state.values())
    # The derivative of the sum is 1 for every entry of the block that was drawn; beta = 0.9.
    assert momentum.max() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("form", ["ema", "sum"])
def test_it_is_without_nesterov_too(form):
    bf16_weights_keep_the_momentum_of_fp32_weights(lambda params: schatten.Muon(params, nesterov=False, form=form))


def test_a_momentum_normalised_in_place_is_caught():
    def check(optimizer):
        bf16_weights_keep_the_momentum_of_fp32_weights(lambda params: optimizer(params, nesterov=False))

    assert_caught(check, "bf16 momentum is normalised in place")


def bf16_weights_decay(optimizer):
    p = nn.Parameter(torch.ones(16, 8, dtype=torch.bfloat16))
    opt = Opt([p], optimizer, lr=1e-2, weight_decay=0.1)
    for _ in range(100):
        step(opt, p, torch.zeros_like(p))
    # 0.999^100; each of 128 entries is off by noise of a few bf16 ulps, 0.004, their mean by a tenth of it.
    assert abs(float(p.detach().float().mean()) - 0.905) < 0.01


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
def test_bf16_weights_decay_by_less_than_their_precision_per_step(decay):
    bf16_weights_decay(lambda params, **options: schatten.Muon(params, decay=decay, **options))


def test_bf16_weights_that_never_decay_are_caught():
    assert_caught(bf16_weights_decay, "bf16 weights are rounded to nearest")


BAD = {
    "complex": lambda: nn.Parameter(torch.randn(3, 4, dtype=torch.complex64)),
    "integer": lambda: nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False),
    "sparse": lambda: nn.Parameter(torch.randn(3, 4).to_sparse()),
    "no leaf": lambda: P(3, 4) * 2,
    "no tensor": lambda: "weight",
    "a vector": lambda: P(5),
    "three dimensions": lambda: P(2, 3, 4),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_parameter_the_constructor_refuses_is_refused_by_add_param_group(any_preset, bad):
    p = BAD[bad]()
    if any_preset is schatten.Lion and bad in ("a vector", "three dimensions"):
        any_preset([p])  # its rule reads a tensor of any shape
        return
    refused = (ValueError, TypeError)
    assert raises(refused, lambda: any_preset([p]))
    assert raises(refused, lambda: any_preset([P(8, 8)]).add_param_group({"params": [p]}))


def one_scale_of_the_gradient_is_as_good_as_another(optimizer, scales=(1e-30, 1e-12, 1e-8, 1e12, 1e30)):
    g, changes = gaussian(8, 24, seed=1), []
    for s in (1.0, *scales):
        p = P(8, 24)
        changes.append(step(decaying(Opt([p], optimizer, lr=0.1), 0.0), p, g * s))
    for s, change in zip(scales, changes[1:], strict=True):
        # A step of 0.1 on weights of 1 loses 1e-6 of itself to fp32, a direction from two QRs or Lanczos as much again.
        assert cos(change, changes[0]) > 0.999, s
        assert abs(change.norm() / changes[0].norm() - 1) < 0.01, s


@pytest.mark.parametrize("name", [n for n in presets.__all__ if getattr(presets, n) not in GRADIENT_SIZED])
def test_a_step_is_the_same_for_gradients_from_1e_30_to_1e30(name):
    one_scale_of_the_gradient_is_as_good_as_another(getattr(presets, name))


def solver_is_scale_invariant(solver):
    G = gaussian(16, 64)
    for s in (1e-30, 1e-12, 1e-8, 1e12, 1e30):
        a, b = solver(G * s), solver(G)
        assert cos(a, b) > 0.999 and abs(a.norm() / b.norm() - 1) < 0.01, s


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_gives_the_same_for_inputs_from_1e_30_to_1e30(name, dtype):
    solver_is_scale_invariant(solver_of(name, dtype))


@pytest.mark.parametrize("function", [schatten.polar, lambda X: schatten.spectral_power(X, 0.0)], ids=["polar", "power 0"])
def test_so_do_the_functions(function):
    solver_is_scale_invariant(function)


def test_an_update_that_shrinks_with_the_gradient_is_caught():
    assert_solver_caught(solver_is_scale_invariant, "an absolute eps")


def test_a_step_that_fails_has_changed_nothing(preset):
    a, b = P(8, 8), P(8, 8, seed=1)
    opt = preset([a, b])
    before = [p.detach().clone() for p in (a, b)]
    a.grad, b.grad = gaussian(8, 8), gaussian(8, 8).to_sparse()
    assert raises(RuntimeError, opt.step)
    assert all(torch.equal(p, w) for p, w in zip((a, b), before, strict=True))
    assert all(value.count_nonzero() == 0 for p in (a, b) for value in opt.state[p].values())


def state_is_complete_from_the_start(optimizer):
    p, q = P(8, 8), P(8, 8, seed=1)
    opt = Opt([p, q], optimizer)
    step(opt, p, gaussian(8, 8))
    assert len(opt.state_dict()["state"]) == 2


def test_state_does_not_depend_on_which_parameters_had_gradients(any_preset):
    state_is_complete_from_the_start(any_preset)


def test_state_that_waits_for_a_gradient_is_caught():
    assert_caught(state_is_complete_from_the_start, "state appears with the first gradient")


def test_the_state_of_adamw_is_refused_at_loading_not_at_the_next_step(any_preset):
    p, w = P(8, 8), P(8, 8)
    adamw = torch.optim.AdamW([w])
    w.grad = gaussian(8, 8)
    adamw.step()
    assert raises(ValueError, lambda: any_preset([p]).load_state_dict(adamw.state_dict()))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["ema", "sum"])
@pytest.mark.parametrize("decay", ["explicit", "implicit"])
def test_the_documented_recursion_is_the_one_that_runs(form, nesterov, decay):
    # The equations of `schatten.Muon`, of `Momentum` and of `DecoupledDecay`, letter by letter in fp64.
    lr, wd, beta, c = 0.1, 0.5, 0.9, 0.2 * 12**0.5
    p = P(12, 7, dtype=torch.float64)
    opt = schatten.Muon(
        [p], lr=lr, weight_decay=wd, momentum=beta, nesterov=nesterov, form=form, decay=decay, solver=schatten.solvers.svd()
    )
    W, M = p.detach().clone(), torch.zeros(12, 7, dtype=torch.float64)
    share = 1 - beta if form == "ema" else 1.0
    for g in gaussian(4, 12, 7, seed=1).double():
        M = beta * M + share * g
        S = share * g + beta * M if nesterov else M
        U = c * exact(S)
        W = (1 - lr * wd) * W - lr * U if decay == "explicit" else (W - lr * U) / (1 + lr * wd)
        step(opt, p, g)
    assert (p.detach() - W).abs().max() < 1e-6
