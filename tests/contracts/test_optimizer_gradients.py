"""What a step may touch: gradients are read only, and a missing, zero or non-finite one changes nothing but counters."""

import copy

import pytest
import torch
from torch import nn

import schatten

NON_FINITE = [float("inf"), float("-inf"), float("nan")]


def matrices(dtype, shapes=((6, 4), (3, 5), (6, 4))):
    return [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in shapes]


def draw_gradients(params):
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)


def values(params):
    return [p.detach().clone() for p in params]


def without_decay(optimizer):
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_step_moves_every_matrix_and_never_writes_to_a_gradient(preset, dtype):
    params = matrices(dtype)
    opt = preset(params, lr=0.1)
    for _ in range(3):  # the second step is the first with a momentum that could be aliased
        draw_gradients(params)
        before, objects, copies = values(params), [p.grad for p in params], [p.grad.clone() for p in params]
        opt.step()
        for p, w, g, kept in zip(params, before, objects, copies, strict=True):
            assert p.grad is g and torch.equal(g, kept)
            assert not torch.equal(p, w)


def test_state_shares_no_memory_with_gradients_or_weights(preset, dtype):
    params = matrices(dtype)
    opt = preset(params)
    draw_gradients(params)
    opt.step()
    state = copy.deepcopy([opt.state[p] for p in params])
    for p in params:
        p.grad.fill_(7)
        p.data.fill_(7)
    assert all(same(opt.state[p], s) for p, s in zip(params, state, strict=True))


def test_a_parameter_without_gradient_keeps_its_value_and_its_state(preset, dtype):
    params = matrices(dtype)
    opt = preset(params, lr=0.1)
    draw_gradients(params)
    opt.step()
    draw_gradients(params)
    params[0].grad = None
    before, state = values(params), copy.deepcopy(opt.state[params[0]])
    opt.step()
    assert torch.equal(params[0], before[0]) and params[0].grad is None
    assert same(opt.state[params[0]], state)
    # The third matrix has the first one's shape, so it was stepped in what would have been their common batch.
    assert not torch.equal(params[2], before[2])


def test_a_zero_gradient_without_decay_leaves_weights_bit_equal(preset, dtype):
    params = matrices(dtype)
    opt = without_decay(preset(params, lr=0.1))
    before = values(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def check_that_only_the_hit_matrix_stops(opt, params, hit, bad):
    draw_gradients(params)
    opt.step()
    draw_gradients(params)
    params[hit].grad[1, 2] = bad
    before, state = values(params), copy.deepcopy(opt.state[params[hit]])
    opt.step()
    assert torch.equal(params[hit], before[hit])
    assert same(opt.state[params[hit]], {**state, "skipped": torch.tensor(1.0)})
    for p, w in zip(params, before, strict=True):
        assert p is params[hit] or (p.isfinite().all() and not torch.equal(p, w))
        assert all(value.isfinite().all() for value in opt.state[p].values())
    metrics = opt.metrics()
    assert metrics["skipped"] == {f"0.{hit}": 1} and metrics["skipped_total"] == 1


@pytest.mark.parametrize("hit", [0, 1], ids=["in a batch", "alone"])
@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_non_finite_gradient_stops_its_own_matrix_only_and_is_counted(preset, dtype, bad, hit):
    params = matrices(dtype)
    check_that_only_the_hit_matrix_stops(preset(params, lr=0.1), params, hit, bad)


@pytest.mark.parametrize("hit", [0, 1], ids=["in a batch", "alone"])
@pytest.mark.parametrize("option", [{"decay": "implicit"}, {"form": "sum"}, {"nesterov": False}, {"maximize": True}], ids=str)
def test_that_holds_for_every_form_of_muon(option, hit):
    params = matrices(torch.float32)
    opt = schatten.Muon(params, lr=0.1, solver=schatten.solvers.svd(), **option)
    check_that_only_the_hit_matrix_stops(opt, params, hit, float("nan"))


@pytest.mark.parametrize("option", [{"decay": "implicit"}, {"form": "sum"}, {"nesterov": False}, {"momentum": 0.0}], ids=str)
def test_no_form_of_muon_writes_to_a_gradient(option, dtype):
    params = matrices(dtype)
    opt = schatten.Muon(params, lr=0.1, **option)
    for _ in range(2):
        draw_gradients(params)
        kept = [p.grad.clone() for p in params]
        opt.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))


def test_a_matrix_that_was_skipped_steps_again_as_if_the_bad_gradient_had_not_come(preset, dtype):
    skipping = matrices(dtype, [(6, 4)])
    reference = [nn.Parameter(p.detach().clone()) for p in skipping]
    options = {"lr": 0.1, "rounding": "nearest"}  # the noise of stochastic rounding depends on the step's number
    a, b = preset(skipping, **options), preset(reference, **options)
    for step in range(4):
        g = torch.randn(6, 4).to(dtype)
        if step == 1:
            skipping[0].grad = torch.full_like(g, float("nan"))
            a.step()
        skipping[0].grad, reference[0].grad = g.clone(), g.clone()
        a.step()
        b.step()
    assert torch.equal(skipping[0], reference[0])


def adamw_pair(dtype):
    weight, bias, other = (nn.Parameter(torch.randn(s).to(dtype)) for s in ((4, 3), (5,), (5,)))
    opt = schatten.Muon([{"params": [weight]}, {"params": [bias, other], "algorithm": "adamw"}], lr=0.1)
    return opt, [weight, bias, other]


@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_non_finite_gradient_stops_its_own_adamw_parameter_only_and_is_counted(dtype, bad):
    opt, params = adamw_pair(dtype)
    draw_gradients(params)
    opt.step()
    draw_gradients(params)
    params[1].grad[3] = bad
    before, state = values(params), copy.deepcopy(opt.state[params[1]])
    opt.step()
    assert torch.equal(params[1], before[1])
    assert same(opt.state[params[1]], {**state, "skipped": torch.tensor(1.0)})
    assert not torch.equal(params[0], before[0]) and not torch.equal(params[2], before[2])
    assert opt.metrics()["skipped"] == {"1.0": 1}


def test_adamw_reads_gradients_only_and_leaves_parameters_without_one_alone(dtype):
    opt, params = adamw_pair(dtype)
    draw_gradients(params)
    opt.step()
    draw_gradients(params)
    params[1].grad = None
    before, state = values(params), copy.deepcopy(opt.state[params[1]])
    kept, kept_value = params[2].grad, params[2].grad.clone()
    opt.step()
    assert torch.equal(params[1], before[1]) and same(opt.state[params[1]], state)
    assert params[2].grad is kept and torch.equal(kept, kept_value)
    assert not torch.equal(params[2], before[2])


def test_a_zero_gradient_without_decay_leaves_adamw_parameters_bit_equal(dtype):
    opt, params = adamw_pair(dtype)
    without_decay(opt)
    before = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_metrics_name_parameters_that_never_had_a_gradient():
    named = [("stem", nn.Parameter(torch.randn(4, 3))), ("head", nn.Parameter(torch.randn(12, 3)))]
    opt = schatten.Muon(named, lr=0.5, scale="keller")
    named[1][1].grad = torch.randn(12, 3)
    opt.step()
    metrics = opt.metrics()
    assert metrics["without_gradient"] == ["stem"]
    assert metrics["skipped"] == {} and metrics["skipped_total"] == 0
    # lr sqrt(max(1, fan_out / fan_in)), from square roots of exact powers of two: no rounding.
    assert metrics["effective_lr"]["head"] == 1.0
    assert metrics["effective_lr"]["stem"] == pytest.approx(0.5 * (4 / 3) ** 0.5)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_in_any_dtype_is_skipped(kind, algorithm, bad):
    p = nn.Parameter(torch.ones(3, 3, dtype=kind))
    opt = schatten.Muon([{"params": [p], "algorithm": algorithm}], lr=0.1)
    p.grad = torch.ones_like(p)
    p.grad[1, 2] = bad
    opt.step()
    assert torch.equal(p, torch.ones_like(p)) and opt.metrics()["skipped_total"] == 1
