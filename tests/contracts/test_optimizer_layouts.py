"""Layouts: memory order changes nothing, a convolution is its flattened matrix, a bank is its separate matrices."""

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers

# The order in memory may change the order of a sum or the use of a fused multiply-add, so an ulp or a few of each dtype
# (a bf16 weight is rounded from fp32 and off by one ulp, 2^-7, or not at all). A misread element is off by 0.1.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}

# Products in the parameter's own precision, as bf16 products would turn one ulp of fp32 into 1 %.
OPTIONS = {"lr": 0.1, "rounding": "nearest"}
SOLVERS = {torch.float64: solvers.polynomial(), torch.float32: solvers.polynomial(dtype="float32")}

CONVOLUTIONS = [(8, 3, 5), (8, 4, 3, 3), (4, 6, 1, 2), (6, 2, 2, 3, 2)]


def run(opt, p, gradients):
    """Steps on the given gradients, laid out as the parameter's shape; the weights after."""
    for g in gradients:
        p.grad = g.reshape(p.shape).to(p.dtype)
        opt.step()
    return p.detach()


def optimizer(p, algorithm, **options):
    solver = SOLVERS.get(p.dtype, SOLVERS[torch.float32])
    return schatten.Muon([{"params": [p], "algorithm": algorithm}], **OPTIONS, solver=solver, **options)


def assert_equal_up_to_rounding(a, b):
    torch.testing.assert_close(a, b, rtol=ROUNDING[a.dtype], atol=ROUNDING[a.dtype])


def transposed(t):
    return t.mT.contiguous().mT


def every_second(t):
    return torch.stack([t, torch.full_like(t, 7)], -1).flatten(-2)[..., ::2]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
@pytest.mark.parametrize("of_gradient", [torch.clone, transposed, every_second], ids=["dense", "transposed", "strided"])
@pytest.mark.parametrize("of_weight", [torch.clone, transposed, every_second], ids=["dense", "transposed", "strided"])
def test_the_order_in_memory_of_weight_and_gradient_does_not_change_a_step(dtype, of_weight, of_gradient, algorithm):
    start, gradients = torch.randn(6, 4).to(dtype), torch.randn(3, 6, 4).to(dtype)
    results, states = [], []
    for w, g in ((torch.clone, torch.clone), (of_weight, of_gradient)):
        p = nn.Parameter(w(start))
        strides = p.stride()
        opt = optimizer(p, algorithm)
        for gradient in gradients:
            p.grad = g(gradient)
            opt.step()
        assert p.stride() == strides
        results.append(p.detach())
        states.append(opt.state[p])
    assert_equal_up_to_rounding(*results)
    for key in states[0]:
        assert_equal_up_to_rounding(states[0][key], states[1][key])


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_a_parameter_that_is_a_slice_of_a_larger_tensor_is_all_that_moves(algorithm):
    whole = torch.randn(6, 8)
    before, p = whole.clone(), nn.Parameter(whole[:, ::2])
    opt = optimizer(p, algorithm)
    p.sum().backward()
    opt.step()
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert (whole[:, ::2] != before[:, ::2]).all()


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_a_channels_last_convolution_steps_as_a_contiguous_one(dtype, algorithm):
    start, gradients = torch.randn(8, 4, 3, 3).to(dtype), torch.randn(3, 8, 4, 3, 3).to(dtype)
    results = []
    for order in (torch.clone, channels_last):
        p = nn.Parameter(order(start))
        opt = optimizer(p, algorithm)
        for g in gradients:
            p.grad = order(g)
            opt.step()
        assert p.stride() == order(start).stride()
        results.append(p.detach())
    assert_equal_up_to_rounding(*results)


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
def test_a_model_may_become_channels_last_between_steps(algorithm):
    start, gradients = torch.randn(8, 4, 3, 3), torch.randn(4, 8, 4, 3, 3)
    results = []
    for order in (torch.clone, channels_last):
        p = nn.Parameter(start.clone())
        opt = optimizer(p, algorithm)
        run(opt, p, gradients[:2])
        p.data = order(p.data)
        for g in gradients[2:]:
            p.grad = order(g)
            opt.step()
        results.append(p.detach())
    assert_equal_up_to_rounding(*results)


@pytest.mark.parametrize("algorithm", ["spectral", "adamw"])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [(torch.clone, channels_last), (channels_last, torch.clone)])
def test_a_checkpoint_of_one_order_in_memory_continues_in_another(saved_as, loaded_as, algorithm):
    start, gradients = torch.randn(8, 4, 3, 3), torch.randn(4, 8, 4, 3, 3)
    p = nn.Parameter(saved_as(start))
    opt = optimizer(p, algorithm)
    run(opt, p, gradients[:2])
    q = nn.Parameter(loaded_as(p.detach()))
    other = optimizer(q, algorithm)
    other.load_state_dict(opt.state_dict())
    assert_equal_up_to_rounding(run(opt, p, gradients[2:]), run(other, q, gradients[2:]))


@pytest.mark.parametrize("scale", ["adamw-rms", "keller", "mup", "none"])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_a_convolution_steps_as_its_flattened_matrix_with_its_shape_factor(shape, scale):
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    conv, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    layout = {"layout": "conv"} if len(shape) == 3 else {}
    a = schatten.Muon([{"params": [conv], **layout}], lr=0.1, scale=scale)
    b = schatten.Muon([matrix], lr=0.1, scale=scale)
    assert torch.equal(run(a, conv, gradients).flatten(1), run(b, matrix, gradients))
    assert a.metrics()["effective_lr"] == b.metrics()["effective_lr"]


def test_a_convolutions_update_is_orthogonal_as_a_matrix_not_kernel_by_kernel():
    p = nn.Parameter(torch.zeros(8, 4, 3, 3))
    opt = schatten.Muon([p], lr=1.0, momentum=0.0, scale="none", solver=solvers.svd())
    spectrum = torch.linalg.svdvals(run(opt, p, [torch.randn(8, 4, 3, 3)]).flatten(1))
    # The exact solver ends on fp32 values: 8 of them each within an ulp or two of 1.
    torch.testing.assert_close(spectrum, torch.ones(8), rtol=0, atol=2e-6)


def test_a_bank_of_experts_steps_as_its_separate_matrices(dtype):
    start, gradients = torch.randn(2, 3, 6, 4).to(dtype), torch.randn(3, 2, 3, 6, 4).to(dtype)
    # Exact solver and plain rounding: bf16 noise is drawn per parameter, so a bank draws other noise than its parts.
    options = {"lr": 0.1, "solver": solvers.svd(), "rounding": "nearest"}
    bank = nn.Parameter(start.clone())
    banked = run(schatten.Muon([{"params": [bank], "layout": "experts"}], **options), bank, gradients)
    separate = [nn.Parameter(w.clone()) for w in start.flatten(0, 1)]
    opt = schatten.Muon(separate, **options)
    for g in gradients.flatten(1, 2):
        for p, gradient in zip(separate, g, strict=True):
            p.grad = gradient.clone()
        opt.step()
    # LAPACK factors matrices one at a time, and elementwise work does not depend on the batch: bit for bit.
    assert torch.equal(banked.flatten(0, 1), torch.stack([p.detach() for p in separate]))


def test_an_expert_without_tokens_stays_and_changes_no_other_experts_step():
    start, g = torch.randn(4, 6, 4), torch.randn(4, 6, 4)
    results = []
    for zeroed in (False, True):
        p = nn.Parameter(start.clone())
        opt = schatten.Muon([{"params": [p], "layout": "experts"}], lr=0.1, weight_decay=0.0, solver=solvers.svd())
        gradient = g.clone()
        if zeroed:
            gradient[1] = 0
        results.append(run(opt, p, [gradient]))
    assert torch.equal(results[0][[0, 2, 3]], results[1][[0, 2, 3]])
    assert torch.equal(results[1][1], start[1]) and not torch.equal(results[0][1], start[1])
