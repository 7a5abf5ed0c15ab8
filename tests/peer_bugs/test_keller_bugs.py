"""KellerJordan/Muon (peers.md 1.2): convolution scales, gradients written to, strides, options of a group."""

import inspect

import pytest
import torch
from torch import nn

import schatten
from schatten import presets
from tests.peer_bugs.helpers import Opt, P, assert_caught, d, gaussian, relative, step, steps


def a_convolution_moves_as_its_flattened_matrix(optimizer):
    a = d(24, 3, 3, 3, optimizer=optimizer, scale="keller")
    b = nn.Parameter(torch.zeros(24, 27))
    opt = Opt([b], optimizer, lr=1.0, weight_decay=0.0, momentum=0.0, scale="keller")
    change = step(opt, b, gaussian(24, 3, 3, 3, seed=10).flatten(1))
    assert relative(a.flatten(1), -change) < 0.01
    wide = d(54, 1, 3, 3, optimizer=optimizer, scale="keller")
    # Half the norm of U V^T at least: sqrt(9), times Keller's sqrt(54 / 9).
    assert wide.norm() > 0.5 * 3 * 6**0.5


def test_the_scale_of_a_convolution_is_that_of_its_flattened_matrix():
    a_convolution_moves_as_its_flattened_matrix(schatten.Muon)


def test_a_scale_from_the_height_and_width_of_the_kernel_is_caught():
    assert_caught(a_convolution_moves_as_its_flattened_matrix, "scale from the height and width of the kernel")


@pytest.mark.parametrize("shape", [(8, 4, 3), (8, 4, 3, 3), (8, 4, 3, 5), (6, 4, 2, 3, 5)], ids=str)
def test_every_preset_steps_a_convolution_as_its_flattened_matrix(any_preset, shape):
    start, g = gaussian(*shape), gaussian(*shape, seed=1)
    conv, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1))
    a = step(any_preset([{"params": [conv], "layout": "conv"}], lr=0.1), conv, g)
    b = step(any_preset([matrix], lr=0.1), matrix, g.flatten(1))
    assert torch.equal(a.flatten(1), b)


def gradients_are_only_read(optimizer):
    params = [P(16, 8), P(5)]
    opt = Opt(params, optimizer)
    for seed in (1, 2):
        given = [gaussian(*p.shape, seed=seed) for p in params]
        copies = [g.clone() for g in given]
        for p, g in zip(params, given, strict=True):
            p.grad = g
        opt.step()
        for p, g, copy in zip(params, given, copies, strict=True):
            assert p.grad is g and torch.equal(g, copy)


def test_a_step_only_reads_gradients(preset):
    gradients_are_only_read(preset)


@pytest.mark.parametrize("mistake", ["the signal is written into the gradient", "the gradient is dropped"])
def test_a_step_that_writes_to_gradients_is_caught(mistake):
    assert_caught(gradients_are_only_read, mistake)


def without_a_gradient_nothing_changes(optimizer):
    params = [P(16, 8), P(16, 8, seed=1), P(5)]
    opt = Opt(params, optimizer)
    for group in opt.param_groups:
        group["weight_decay"] = 0.1
    before = [p.detach().clone() for p in params]
    params[1].grad = gaussian(16, 8)
    opt.step()
    for p, w in ((params[0], before[0]), (params[2], before[2])):
        assert torch.equal(p, w) and p.grad is None


def test_without_a_gradient_nothing_moves_or_decays(preset):
    without_a_gradient_nothing_changes(preset)


def test_a_missing_gradient_taken_for_zero_is_caught():
    assert_caught(without_a_gradient_nothing_changes, "a missing gradient is zero")


def test_channels_last_convolutions_step_as_contiguous_ones(any_preset):
    changes = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        p = nn.Parameter(gaussian(16, 8, 3, 3).to(memory_format=memory_format))
        g = gaussian(16, 8, 3, 3, seed=1).to(memory_format=memory_format)
        changes.append(step(any_preset([p], lr=0.1), p, g))
        assert p.is_contiguous(memory_format=memory_format)
    assert torch.allclose(*changes, atol=1e-3)


def test_what_a_group_shows_may_be_written_into_a_new_group(any_preset):
    opt = any_preset([P(8, 8)])
    group = {k: v for k, v in opt.param_groups[0].items() if k not in ("params", "param_names")}
    p, q = P(8, 8), P(8, 8)
    a = steps(any_preset([{"params": [p], **group}]), [p], 2)
    b = steps(any_preset([q]), [q], 2)
    assert torch.equal(a[0], b[0])


def test_nesterov_may_differ_between_groups():
    p, q = P(8, 8), P(8, 8)
    opt = schatten.Muon([{"params": [p]}, {"params": [q], "nesterov": False}], lr=0.1)
    for seed in (1, 2):
        p.grad = q.grad = gaussian(8, 8, seed=seed)
        opt.step()
    assert not torch.equal(p, q)


NESTEROV = [name for name in presets.__all__ if "nesterov" in inspect.signature(getattr(presets, name)).parameters]


@pytest.mark.parametrize("name", NESTEROV)
def test_every_preset_with_nesterov_takes_both_values_and_they_differ(name):
    ends = []
    for nesterov in (True, False):
        p = P(8, 8)
        ends.append(steps(getattr(presets, name)([p], lr=0.1, nesterov=nesterov), [p], 2)[0])
    assert not torch.equal(*ends)
