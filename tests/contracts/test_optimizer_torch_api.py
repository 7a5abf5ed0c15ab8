"""torch.optim.Optimizer's manners: closures, tensor lr, maximize, copies, pickles, hooks, zero_grad."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import schatten
from tests.contracts.driving import step


def matrix(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*(shape or (6, 4))).to(dtype))


def train(opt, params, steps=3, seed=1):
    """`steps` steps on seeded gradients; the weights after."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        step(opt)
    return [p.detach().clone() for p in params]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_closure_runs_with_grad_its_value_is_returned_and_its_gradients_are_used(preset):
    p = matrix()
    opt, before, enabled = preset([p], lr=0.1), p.detach().clone(), []

    def closure():
        enabled.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert enabled and all(enabled)
    assert torch.equal(loss.detach(), before.square().sum())
    assert not torch.equal(p, before)


def test_a_step_without_closure_returns_none_and_leaves_grad_mode_alone(preset):
    p = matrix()
    opt = preset([p])
    p.grad = torch.randn(6, 4)
    assert opt.step() is None
    assert torch.is_grad_enabled() and p.requires_grad and p.is_leaf


def test_training_lowers_a_loss(preset):
    # The target has the start's norm, for the rule that keeps it. Where the lr is a spectral norm, 30 steps of 0.1 take 3 of
    # a largest singular value of 7; a rank-one step only of that one. SimplifiedMuon is stable up to 2 / L_sp = 2 / 16.
    p = matrix(8, 8)
    target = p.detach().flatten().flip(0).reshape(8, 8)
    # Scion's lr is a share of its radius, 50 by default.
    opt = preset([p], lr=0.1, **({"radius": 1.0} if preset is schatten.Scion else {}))
    first = (p.detach() - target).square().sum()
    for _ in range(30):
        opt.zero_grad()
        (p - target).square().sum().backward()
        opt.step()
    assert (p.detach() - target).square().sum() < 0.9 * first


@pytest.mark.parametrize(
    "lr",
    [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([0.1], dtype=torch.float64)],
    ids=["0-d", "1 element", "1 element of fp64"],
)
def test_a_tensor_lr_acts_as_the_number_does(lr, dtype):
    weight, bias = torch.randn(6, 4).to(dtype), torch.randn(5).to(dtype)
    results = []
    for value in (lr, float(lr)):
        params = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
        opt = schatten.Muon([{"params": params[0]}, {"params": params[1], "algorithm": "adamw"}], lr=value, rounding="nearest")
        results.append(train(opt, params))
    assert opt.param_groups[0]["lr"] == float(lr)
    for with_tensor, with_number in zip(*results, strict=True):
        # lr wd and lr U are rounded to fp32 once more as tensors; one such rounding may tip one bf16 rounding.
        tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(with_tensor, with_number, rtol=tolerance, atol=tolerance)


def test_a_changed_tensor_lr_is_followed():
    lr, p = torch.tensor(0.1), matrix()
    opt = schatten.Muon([p], lr=lr, weight_decay=0.0)
    lr.zero_()
    before = p.detach().clone()
    assert all_equal(train(opt, [p]), [before])


def test_maximize_descends_on_the_negated_gradient(preset, dtype):
    start, results = torch.randn(6, 4).to(dtype), []
    for sign, maximize in ((1, True), (-1, False)):
        p = nn.Parameter(start.clone())
        opt = preset([p], lr=0.1)
        opt.param_groups[0]["maximize"] = maximize
        for g in torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1)).to(dtype):
            p.grad = sign * g
            step(opt)
        results.append(p.detach())
    assert torch.equal(*results)


def test_maximize_reaches_adamw_groups():
    params = [matrix(4, 3), matrix(5)]
    opt = schatten.Muon([{"params": params[0]}, {"params": params[1], "algorithm": "adamw"}], lr=0.1, maximize=True)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    # Decay alone would pull 1 % towards zero; the update of 0.1 per entry (bias) or 0.07 (weight) dominates it on the sum.
    assert all(p.sum() > w.sum() for p, w in zip(params, before, strict=True))


def copies(module_and_optimizer):
    yield copy.deepcopy(module_and_optimizer)
    yield pickle.loads(pickle.dumps(module_and_optimizer))
    buffer = io.BytesIO()
    torch.save(module_and_optimizer, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


def test_copies_and_pickles_go_on_bit_for_bit_and_leave_the_original_alone(any_preset, dtype):
    params = nn.ParameterList([matrix(dtype=dtype), matrix(dtype=dtype), matrix(3, 5, dtype=dtype)])
    opt = any_preset(list(params), lr=0.1)
    train(opt, params)
    middle = [p.detach().clone() for p in params]
    results = [train(other_opt, list(other), seed=2) for other, other_opt in copies((params, opt))]
    assert all_equal(params, middle)
    expected = train(opt, list(params), seed=2)
    assert all(all_equal(result, expected) for result in results)


def test_a_copy_of_a_routed_optimizer_keeps_its_plan_and_can_be_extended():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = schatten.Muon(model)
    for _, other in copies((model, opt)):
        assert str(other.plan) == str(opt.plan)
        assert other.metrics() == opt.metrics()
        other.add_param_group({"params": [("new", matrix())]})
        assert other.param_groups[-1]["param_names"] == ["new"]


def test_step_hooks_run_before_and_after_each_step(any_preset):
    p = matrix()
    opt, events = any_preset([p], lr=0.1), []
    before = p.detach().clone()
    opt.register_step_pre_hook(lambda *_: events.append(("pre", torch.equal(p, before))))
    opt.register_step_post_hook(lambda *_: events.append(("post", torch.equal(p, before))))
    p.grad = torch.randn(6, 4)
    step(opt)
    assert events == [("pre", True), ("post", False)]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_gradients_of_both_algorithms(to_none):
    params = [matrix(), matrix(5)]
    opt = schatten.Muon([{"params": params[0]}, {"params": params[1], "algorithm": "adamw"}])
    for p in params:
        p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else p.grad.count_nonzero() == 0 for p in params)


def test_repr_shows_the_options():
    text = repr(schatten.Muon([matrix()], scale="mup", solver=schatten.solvers.svd()))
    assert "scale: mup" in text and "solver: svd()" in text and "nesterov: True" in text


def test_a_parameter_without_entries_is_stepped_over(any_preset):
    empty, p = nn.Parameter(torch.zeros(0, 4)), matrix()
    opt, before = any_preset([empty, p], lr=0.1), p.detach().clone()
    empty.grad, p.grad = torch.zeros(0, 4), torch.randn(6, 4)
    step(opt)
    assert not torch.equal(p, before)


def test_an_adamw_parameter_without_entries_is_stepped_over():
    empty, p = nn.Parameter(torch.zeros(0)), matrix(5)
    opt, before = schatten.Muon([{"params": [empty, p], "algorithm": "adamw"}], lr=0.1), p.detach().clone()
    empty.grad, p.grad = torch.zeros(0), torch.randn(5)
    opt.step()
    assert not torch.equal(p, before)
