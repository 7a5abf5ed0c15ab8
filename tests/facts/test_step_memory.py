"""A step allocates at most `max_batch_bytes` beside state and gradients, measured by torch's own memory events."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import schatten
from schatten import maps, solvers
from schatten.batching import MAX_BATCH_BYTES


def peak_bytes(call):
    path = Path(__file__).parents[2] / "benchmarks/common.py"
    spec = importlib.util.spec_from_file_location("common", path)
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    return common.peak_bytes(call)


def parameters(shapes):
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    return params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96), (96, 120)])
def test_the_peak_of_a_step_keeps_to_max_batch_bytes(shape, dtype):
    params = parameters([shape] * 24)
    solver = solvers.polynomial(dtype=dtype)
    for bound in (1 << 20, 1 << 21, 1 << 23):
        opt = schatten.Muon(params, solver=solver, max_batch_bytes=bound)
        opt.step()
        # Flags, counters and the quarter of a KiB that torch rounds up for each tensor.
        assert peak_bytes(opt.step) <= bound + (1 << 16)


def test_less_memory_for_a_batch_means_less_memory_for_a_step():
    params = parameters([(96, 96)] * 32)
    peaks = [peak_bytes(schatten.Muon(params, max_batch_bytes=bound).step) for bound in (1 << 18, 1 << 20, 1 << 22)]
    assert peaks[0] < 0.5 * peaks[1] < 0.25 * peaks[2]


def test_the_tower_keeps_to_it_too():
    class Power(schatten.Muon):
        def rule(self, group):
            return schatten.Rule(map=maps.Power(0.5, solver=solvers.tower(dtype="float32")))

    params = parameters([(96, 96)] * 24)
    opt = Power(params, max_batch_bytes=1 << 21)
    opt.step()
    assert peak_bytes(opt.step) <= (1 << 21) + (1 << 16)


@pytest.mark.parametrize("shape", [(96, 96), (64, 256)])
def test_every_preset_keeps_to_it(preset, shape):
    params = parameters([shape] * 24)
    opt = preset(params, max_batch_bytes=1 << 22)
    # The exact solver of the simplified rule works in fp64, with LAPACK's workspace.
    # A Krylov basis of five directions is nearly as wide as these small matrices.
    allowed = {schatten.SimplifiedMuon: 2, schatten.Fanion: 1.2}.get(preset, 1)
    opt.step()
    opt.step()
    assert peak_bytes(opt.step) <= allowed * (1 << 22) + (1 << 16)


def test_the_default_is_below_one_and_a_half_times_gpt2s_largest_same_shape_batch():
    assert MAX_BATCH_BYTES < 1.5 * 48 * 768 * 768 * 4


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "1MB"])
def test_what_is_no_number_of_bytes_is_refused(bad):
    with pytest.raises(ValueError, match="max_batch_bytes must be a positive number of bytes, got"):
        schatten.Muon(parameters([(4, 4)]), max_batch_bytes=bad)
