"""LIONS-EPFL/scion (peers.md 1.7): stacks read as convolutions, kernels assumed square, `momentum` for one minus momentum."""

import inspect

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
    d,
    decaying,
    exact,
    gaussian,
    solver_of,
    step,
    sv,
)


def a_stack_is_a_batch(solver):
    X = gaussian(4, 32, 64)
    assert torch.allclose(solver(X), torch.stack([solver(x) for x in X]), atol=1e-2)
    assert sv(solver(X)).max() < 1.3 and sv(solver(X)).min() > 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stack_is_a_batch_of_matrices(name):
    a_stack_is_a_batch(solver_of(name))


def test_a_stack_taken_for_one_matrix_is_caught():
    assert_solver_caught(a_stack_is_a_batch, "a stack is one matrix")


def every_expert_is_orthogonal(optimizer, counts=(4, 8, 64)):
    for count in counts:
        sigma = sv(d(count, 8, 16, layout="experts", optimizer=optimizer))
        assert sigma.max() < 1.3 and sigma.min() > 0.5, count


def test_a_bank_of_experts_is_a_batch_of_matrices():
    every_expert_is_orthogonal(schatten.Muon)


def test_experts_orthogonalised_as_one_matrix_are_caught():
    assert_caught(every_expert_is_orthogonal, "experts are one matrix")


def test_every_preset_steps_a_bank_as_its_experts_apart(preset):
    start, g = gaussian(3, 8, 12), gaussian(3, 8, 12, seed=1)
    bank = nn.Parameter(start.clone())
    together = step(preset([{"params": [bank], "layout": "experts"}], lr=0.1), bank, g)
    for i in range(3):
        expert = nn.Parameter(start[i].clone())
        alone = step(preset([expert], lr=0.1), expert, g[i])
        # Batched products may sum in another order: fp32 rounding times gains of 1e2, in steps of up to 1.
        assert (together[i] - alone).abs().max() < 2e-3


@pytest.mark.parametrize("shape", [(8, 4, 3), (8, 4, 3, 5), (8, 4, 2, 3, 5)], ids=str)
def test_kernels_of_any_shape_step_as_flattened_matrices(shape):
    a = d(*shape, layout="conv", scale="keller").flatten(1)
    b = nn.Parameter(torch.zeros(a.shape))
    change = step(Opt([b], lr=1.0, weight_decay=0.0, momentum=0.0, scale="keller"), b, gaussian(*shape, seed=10).flatten(1))
    assert torch.allclose(a, -change, atol=1e-2)


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, (3, 5)), nn.Conv3d(4, 8, (2, 3, 5))], ids=lambda layer: type(layer).__name__
)
def test_initialisation_takes_kernels_of_any_shape(layer):
    schatten.init_spectral_(layer)
    W = layer.weight.detach().flatten(1)
    assert float(sv(W).max()) == pytest.approx((W.shape[0] / W.shape[1]) ** 0.5, rel=1e-5)


def momentum_is_what_is_kept(optimizer):
    p = P(8, 8)
    opt = decaying(Opt([p], optimizer, lr=1.0, momentum=0.0), 0.0)
    step(opt, p, gaussian(8, 8, seed=1))
    g = gaussian(8, 8, seed=2)
    assert cos(-step(opt, p, g), exact(g)) > 0.98


def test_momentum_zero_forgets_the_last_gradient():
    momentum_is_what_is_kept(schatten.Muon)
    momentum_is_what_is_kept(schatten.Scion)


def test_momentum_that_means_one_minus_momentum_is_caught():
    assert_caught(momentum_is_what_is_kept, "momentum is one minus momentum")


def reads_gradients_with_momentum(name):
    preset = getattr(presets, name)
    return not preset.needs_closure and "momentum" in inspect.signature(preset).parameters


@pytest.mark.parametrize("name", [n for n in presets.__all__ if reads_gradients_with_momentum(n)])
def test_in_every_preset_more_momentum_keeps_more_of_the_past(name):
    preset = getattr(presets, name)
    first, second, kept = gaussian(8, 8, seed=1), gaussian(8, 8, seed=2), []
    for momentum in (0.1, 0.9):
        p = P(8, 8)
        opt = Opt([p], preset, lr=0.1, momentum=momentum)
        step(opt, p, first)
        step(opt, p, second)
        (buffer,) = (s["momentum_buffer"] for s in opt.state.values())
        # The shares of the two gradients in the buffer, as far as they span it.
        past, present = torch.linalg.lstsq(torch.stack([first.flatten(), second.flatten()], 1), buffer.flatten()).solution
        kept.append(float(past.abs() / (past.abs() + present.abs())))
    assert kept[0] < kept[1]
