"""Monitor reads what it says it reads: weights, gradients, momentum, updates and Hessians, in every form and kind of step."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten.monitor import Monitor
from tests.contracts.monitoring import Reads, one_matrix, reading


def test_weights_gradients_and_momentum_are_those_that_a_step_starts_from():
    W, opt = one_matrix()
    W.grad = torch.ones_like(W)
    opt.step()
    before, average = W.detach().clone(), opt.state[W]["momentum_buffer"].clone()
    read = reading("gradient", "momentum")
    with Monitor(opt, 1, [read]):
        W.grad = torch.full_like(W, 2.0)
        opt.step()
    (block,) = read.blocks
    assert torch.equal(block.weight[0], before) and torch.equal(block.momentum[0], average)
    assert torch.equal(block.gradient[0], torch.full_like(W, 2.0))
    assert block.name == "W" and block.rule == opt.rule(opt.param_groups[0]) and block.group["lr"] == 0.1


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_the_update_is_the_change_of_the_weight_besides_decay(lr):
    W, opt = one_matrix(lr=lr)
    before = W.detach().clone()
    read = reading("update", "gradient")
    with Monitor(opt, 1, [read]):
        W.grad = torch.randn_like(W)
        opt.step()
    expected = W.detach() - before * (1 - 0.1 * 0.5)
    assert torch.allclose(read.blocks[0].update[0], expected, atol=1e-6)
    assert torch.equal(read.blocks[0].weight[0], before)
    # lr c U V^T: with the decay left in it would be longer by 5 % of the weight.
    c = read.blocks[0].factor
    assert float(torch.linalg.matrix_norm(read.blocks[0].update[0], 2)) == pytest.approx(0.1 * c, rel=0.15)


@pytest.mark.parametrize("decay", ["explicit", "implicit"])
def test_the_update_of_either_decay_is_lr_c_times_the_direction(decay):
    W, opt = one_matrix(decay=decay, momentum=0.0, solver=schatten.solvers.svd())
    read = reading("update")
    with Monitor(opt, 1, [read]):
        W.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        opt.step()
    (block,) = read.blocks
    torch.testing.assert_close(block.update[0], -0.1 * block.factor * schatten.solvers.svd()(W.grad))


def test_a_skipped_parameter_has_no_update_and_its_numbers_are_not_finite():
    W, opt = one_matrix()
    read = reading("update")
    with Monitor(opt, 1, [read, "gradient"]) as monitor:
        W.grad = torch.full_like(W, math.nan)
        opt.step()
    assert not read.blocks[0].update.any()
    assert math.isnan(monitor.records[0]["gradient/frobenius"])


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_momentum_is_read_as_it_is_stored(state_dtype):
    W, opt = one_matrix(state_dtype=state_dtype)
    G = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    W.grad = G
    opt.step()
    read = reading("momentum")
    with Monitor(opt, 1, [read]):
        opt.step()
    M = read.blocks[0].momentum[0]
    beta = opt.param_groups[0]["momentum"]
    # bf16 has 8 bits, bytes have 7 of the row's largest entry.
    tolerance = {None: 1e-6, "bfloat16": 2**-7, "int8": 2**-6}[state_dtype] * float(G.abs().max())
    assert M.dtype == torch.float32 and (M - (1 - beta) * G).abs().max() <= tolerance * (1 - beta) + 1e-9


def test_a_closure_has_its_gradients_at_the_weights_before_the_step():
    W, opt = one_matrix()
    before = W.detach().clone()
    read = reading("gradient", "momentum")

    def closure():
        opt.zero_grad()
        loss = (W**2).sum() / 2
        loss.backward()
        return loss

    with Monitor(opt, 1, [read]):
        opt.step(closure)
        opt.step(closure=closure)
    assert torch.equal(read.blocks[0].weight[0], before) and torch.equal(read.blocks[0].gradient[0], before)
    assert not read.blocks[0].momentum.any(), "that before the step"
    assert torch.equal(read.blocks[1].gradient, read.blocks[1].weight) and read.blocks[1].momentum.any()


def test_quantities_of_the_hessian_take_the_gradient_of_their_own_loss_where_a_closure_evaluates():
    W, opt = one_matrix()
    before = W.detach().clone()
    read = reading("gradient", "hessian")

    def closure():
        opt.zero_grad()
        loss = W.sum()
        loss.backward()
        return loss

    with Monitor(opt, 1, [read], model=nn.Module(), loss=lambda: (W**2).sum() / 2):
        opt.step(closure)
    assert torch.equal(read.blocks[0].weight[0], before) and torch.equal(read.blocks[0].gradient[0], before)


def test_what_a_maximising_group_minimises_has_the_other_gradient():
    W, opt = one_matrix(maximize=True)
    read = reading("gradient")
    with Monitor(opt, 1, [read]):
        W.grad = torch.ones_like(W)
        opt.step()
    assert torch.equal(read.blocks[0].gradient[0], -torch.ones_like(W))


def test_pieces_and_blocks_have_names_of_their_own():
    W = nn.Parameter(torch.randn(16, 8))
    layout = schatten.Layout(split=(8, 4, 4), heads=(4, 2, 2))
    opt = schatten.Muon([{"params": [("qkv", W)], "layout": layout}])
    W.grad = torch.randn_like(W)
    with Monitor(opt, 1, ["update"]) as monitor:
        opt.step()
    names = [record["name"] for record in monitor.records]
    assert names == ["qkv.0", *(f"qkv.1[{i}]" for i in range(4))] or names[0].startswith("qkv.0")
    assert sum(name.startswith("qkv.1[") for name in names) == 4


def test_many_blocks_have_one_record_with_smallest_mean_and_largest():
    W = nn.Parameter(torch.randn(20, 4, 4))
    opt = schatten.Muon([{"params": [("bank", W)], "layout": "experts"}])
    W.grad = torch.randn_like(W)
    with Monitor(opt, 1, ["gradient"]) as monitor:
        opt.step()
    (record,) = monitor.records
    norms = torch.linalg.matrix_norm(W.grad.double())
    assert record["name"] == "bank[20 blocks]"
    assert record["gradient/frobenius.min"] == pytest.approx(float(norms.min()))
    assert record["gradient/frobenius.mean"] == pytest.approx(float(norms.mean()))
    assert record["gradient/frobenius.max"] == pytest.approx(float(norms.max()))


def test_products_with_the_hessian_are_those_of_each_piece_alone():
    W = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    opt = schatten.Muon([{"params": [("W", W)], "layout": schatten.Layout(split=(4, 2))}])
    scale = torch.arange(24.0).view(6, 4)
    read = reading("hessian")
    found = []
    original = Reads.__call__

    class Products(Reads):
        def __call__(self, of):
            found.append(of.hessian(torch.ones_like(of.weight)))
            return original(self, of)

    read = Products(frozenset({"hessian"}))
    with Monitor(opt, 1, [read], model=nn.Module(), loss=lambda: (scale * W**2).sum() / 2 + W[0, 0] * W[5, 0]):
        W.grad = torch.randn_like(W)
        opt.step()
    assert torch.equal(found[0][0], scale[:4]) and torch.equal(found[1][0], scale[4:])
