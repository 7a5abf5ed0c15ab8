"""nil0x9/flash-muon (peers.md 1.6): hard-coded devices and process groups, buffers in groups; ranks: tests/distributed."""

import torch

import schatten
from tests.peer_bugs.helpers import Opt, P, assert_caught, gaussian, step
from tests.peer_bugs.test_keller_bugs import without_a_gradient_nothing_changes


def test_one_process_on_a_cpu_needs_no_process_group(any_preset):
    p = P(16, 8)
    assert not torch.distributed.is_initialized()
    change = step(any_preset([p], lr=0.1), p, gaussian(16, 8))
    assert change.abs().sum() > 0
    assert not torch.distributed.is_initialized()


def groups_hold_no_buffers(optimizer):
    opt = Opt([P(8, 8), P(5)], optimizer)
    for group in (*opt.param_groups, *opt.state_dict()["param_groups"]):
        for key, value in group.items():
            assert key == "params" or not (torch.is_tensor(value) and value.numel() > 1), key


def test_no_tensor_but_the_parameters_is_in_a_group(preset):
    groups_hold_no_buffers(preset)


def test_a_buffer_in_the_groups_is_caught():
    assert_caught(groups_hold_no_buffers, "buffers in the groups")


def test_a_batch_in_which_some_gradients_are_missing_steps_the_others():
    without_a_gradient_nothing_changes(schatten.Muon)
    params = [P(16, 8, seed=i) for i in range(3)]
    opt = schatten.Muon(params, lr=0.1)
    params[2].grad = gaussian(16, 8)
    before = params[2].detach().clone()
    opt.step()
    assert not torch.equal(params[2], before)
