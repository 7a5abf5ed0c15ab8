"""Every preset, given the same gradients, takes one process's steps however its parameters lie on the ranks."""

import math

import pytest
import torch

from schatten import presets
from tests.distributed import preset_runs, ranks
from tests.distributed.preset_runs import MESHES, part
from tests.distributed.ranks import remembered

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")

# JaguarMuon evaluates gradients itself; EF21Muon takes each rank for a worker with gradients of its own.
PRESETS = [name for name in presets.__all__ if not getattr(presets, name).needs_closure and name != "EF21Muon"]

OPTIONS = {
    "stochastic rounding": ("Muon", "bfloat16", {}),
    "kahan": ("Muon", "bfloat16", {"rounding": "kahan"}),
    "bf16 state": ("Muon", "float32", {"state_dtype": "bfloat16"}),
    "small batches": ("NorMuon", "float64", {"max_batch_bytes": 1}),
    "maximize": ("Muon", "float64", {"maximize": True}),
}

RUNS = {**{name: (name, "float64", {}) for name in PRESETS}, **OPTIONS}

SIZES = {name: math.prod(mesh.sizes) for name, mesh in MESHES.items()}

# One of each kind: a map alone, a state of rows, of eigenbases and of factors, a whole step, entries alone.
KINDS = ("Muon", "NorMuon", "SOAPMuon", "Dion", "Hyperball", "Lion", *OPTIONS)


def runs_on(mesh):
    return list(RUNS) if mesh in ("one process", "rows of two", "columns of two") else KINDS


@remembered
def of_ranks(size):
    runs = {mesh: [RUNS[name] for name in runs_on(mesh)] for mesh, own in SIZES.items() if own == size}
    return ranks.run(preset_runs.of_rank, size, runs)


def found(mesh):
    """The outcome of every run on each rank."""
    return [dict(zip(runs_on(mesh), own[mesh], strict=True)) for own in of_ranks(SIZES[mesh])]


SPREAD = [mesh for mesh in MESHES if mesh != "one process"]

CASES = [(mesh, name) for mesh in SPREAD for name in runs_on(mesh)]


@pytest.mark.parametrize(("mesh", "name"), [(mesh, name) for mesh, name in CASES if RUNS[name][1] == "float64"])
def test_steps_and_state_are_those_of_one_process(mesh, name):
    (expected,) = found("one process")
    for rank, own in enumerate(found(mesh)):
        assert own[name].keys() == expected[name].keys()
        for key, (value, cut) in own[name].items():
            whole = expected[name][key][0]
            # Products of other batches, in fp64, and what an eigenbasis makes of them.
            own_part = part(whole, cut, mesh, rank)
            assert value.shape == own_part.shape, key
            assert not value.numel() or (value - own_part).abs().max() <= 1e-9 * max(1.0, float(whole.abs().max())), key


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_ranks_with_the_same_part_hold_the_same_bits(mesh, name):
    parts = {}
    for rank, own in enumerate(found(mesh)):
        for key, (value, cut) in own[name].items():
            # The same numbers cut the same way are the same part.
            where = tuple(part(torch.arange(SIZES[mesh]), [0 if dim is not None else None for dim in cut], mesh, rank).tolist())
            assert torch.equal(parts.setdefault((key, where), value), value), key


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_state_of_a_parameters_shape_lies_as_the_parameter_does(mesh, name):
    (expected,) = found("one process")
    shapes = {key: value.shape for key, (value, _) in expected[name].items()}
    for own in found(mesh):
        for key, (_, cut) in own[name].items():
            parameter = key.split(", ")[0]
            if shapes[key] == shapes[parameter]:
                assert cut == own[name][parameter][1], key
