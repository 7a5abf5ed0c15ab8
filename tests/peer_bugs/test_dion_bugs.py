"""microsoft/dion (peers.md 1.3): layers mixed in a batch, crashes by compilation; ranks: tests/distributed."""

import os
import subprocess
import sys

import torch

import schatten
from tests.peer_bugs.helpers import Opt, P, assert_caught, ds, gaussian, stepped, sv

SHAPES = [(16, 8, 3, 3)] * 3 + [(16, 32)] * 3


def every_layer_is_orthogonalised_by_itself(optimizer):
    for D in ds(SHAPES, optimizer):
        # The default band is [0.84, 1.16] above 1e-3 of the norm, and Gaussians of two by one have nothing below.
        assert sv(D.flatten(1)).min() > 0.5


def test_layers_of_one_shape_are_orthogonalised_one_by_one():
    every_layer_is_orthogonalised_by_itself(schatten.Muon)


def test_layers_orthogonalised_as_one_matrix_are_caught():
    assert_caught(every_layer_is_orthogonalised_by_itself, "layers of one shape are one matrix")


def test_who_else_is_in_the_optimizer_does_not_change_a_step(preset):
    together = [P(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    alone = [P(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    for params, optimizers in ((together, [Opt(together, preset, lr=0.1)]), (alone, [Opt([p], preset, lr=0.1) for p in alone])):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=20 + i)
        for opt in optimizers:
            stepped(opt)
    for p, q in zip(together, alone, strict=True):
        # Batched and single products may sum in another order: 1e-6 of a step of about 1, times gains of 1e2.
        assert (p - q).abs().max() < 2e-3


def test_twenty_shapes_do_not_reach_a_recompile_limit():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.utils.counters.clear()
    for D in ds([(8 + i, 16 + 2 * i) for i in range(20)]):
        assert sv(D).max() < 1.3
    assert torch._dynamo.config.recompile_limit == limit
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


ONE_STEP_OF_EVERY_PRESET = """
import sys

# An entry of None is a package that is not installed.
sys.modules.update(dict.fromkeys({absent}))

import torch
import schatten

torch.manual_seed(0)
for name in schatten.presets.__all__:
    preset = getattr(schatten.presets, name)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 8))
    before = [p.detach().clone() for p in model.parameters()]
    opt = preset(model, lr=0.1)

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(2, 1, 4, 4)).square().sum()
        if loss.requires_grad:
            loss.backward()
        return loss

    opt.step(closure)
    changed = [not torch.equal(p, w) and p.isfinite().all().item() for p, w in zip(model.parameters(), before)]
    assert all(changed), (name, changed)
    print(name)
"""

OPTIONAL = ("triton", "cutlass", "quack", "numpy", "scipy", "transformers", "accelerate", "lightning", "typer", "rich")


def test_every_preset_steps_with_compilation_disabled_and_no_optional_package():
    run = subprocess.run(
        [sys.executable, "-c", ONE_STEP_OF_EVERY_PRESET.replace("{absent}", repr(OPTIONAL))],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == schatten.presets.__all__
