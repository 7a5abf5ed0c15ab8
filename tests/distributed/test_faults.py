"""Ranks that differ neither hang nor diverge: gradients that some lack, refusals of one, nan on one, death of one."""

from datetime import timedelta

import pytest
import torch

from tests.distributed import faults_runs, ranks
from tests.distributed.faults_runs import FAULTS, KINDS, SHAPES, STEPS, absent, drawn
from tests.distributed.ranks import remembered

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")

SIZES = {"sharded": 3, "owners": 3, "zero1": 3, "copies of shards": 4}

# Seconds that ranks wait for one that is silent.
PATIENCE = timedelta(seconds=3)


@remembered
def found(kind):
    size = SIZES[kind]
    of_ranks = ranks.run(faults_runs.of_rank, size, [kind for kind in KINDS if SIZES[kind] == size])
    return [own[kind] for own in of_ranks]


def one_process(gradients):
    """The outcome of steps with these gradients, None for a parameter without one."""
    params, opt = faults_runs.start("one process")
    for own in gradients:
        for name, p in params.items():
            p.grad = own[name]
        opt.step()
    return faults_runs.seen(params, opt)


def assert_near(run, expected):
    for name, W in expected["weights"].items():
        # fp32 products of other batches, four steps.
        assert (run["weights"][name] - W).abs().max() < 1e-5, name
    assert run["steps"] == expected["steps"]


def assert_identical(runs):
    first, *others = runs
    for own in others:
        assert all(torch.equal(own["weights"][name], W) for name, W in first["weights"].items())
        assert (own["steps"], own["skipped"]) == (first["steps"], first["skipped"])


def with_zeros(name, step):
    """A gradient as it is where ranks without their shard of it have zeros, None where all lack it."""
    lacking = [rank for rank in range(3) if name in absent(step, rank)]
    if len(lacking) == 3:
        return None
    shards = drawn(name, step + 1).chunk(3)
    return torch.cat([torch.zeros_like(shard) if rank in lacking else shard for rank, shard in enumerate(shards)])


def test_a_shard_without_a_gradient_counts_as_zeros():
    runs = [own["missing"] for own in found("sharded")]
    assert_identical(runs)
    expected = one_process([{name: with_zeros(name, step) for name in SHAPES} for step in range(STEPS)])
    assert_near(runs[0], expected)
    assert runs[0]["skipped"] == dict.fromkeys(SHAPES, 0)


@pytest.mark.parametrize("kind", ["owners", "zero1", "copies of shards"])
def test_a_copy_without_a_gradient_leaves_the_parameter_on_all_ranks(kind):
    size, runs = SIZES[kind], [own["missing"] for own in found(kind)]
    assert_identical(runs)
    lacking = {name: [sum(name in absent(step, rank) for rank in range(size)) for step in range(STEPS)] for name in SHAPES}
    gradients = [{name: None if lacking[name][step] else drawn(name, step + 1) for name in SHAPES} for step in range(STEPS)]
    assert_near(runs[0], one_process(gradients))
    # Where no rank has a gradient, nothing is lost that could be counted.
    assert runs[0]["skipped"] == {name: sum(0 < n < size for n in own) for name, own in lacking.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(kind):
    runs = [own["not finite"] for own in found(kind)]
    assert_identical(runs)
    skipped = ["", "a", "bank", "vector"]
    gradients = [{name: None if name == skipped[k] else drawn(name, k + 1) for name in SHAPES} for k in range(4)]
    assert_near(runs[0], one_process(gradients))
    assert runs[0]["skipped"] == {"a": 1, "b": 0, "bank": 1, "vector": 1}


REFUSALS = [(kind, fault) for fault, (_, kinds) in FAULTS.items() for kind in kinds]


@pytest.mark.parametrize(("kind", "fault"), REFUSALS)
def test_a_fault_of_one_rank_is_told_to_all_before_anything_changes(kind, fault):
    for own in found(kind):
        assert own[fault]["told"] is not None
        assert own[fault]["unchanged"]


@pytest.mark.parametrize(("kind", "fault"), REFUSALS)
def test_ranks_continue_together_when_a_fault_is_mended(kind, fault):
    runs = [own[fault] for own in found(kind)]
    assert [own["again"] for own in runs] == [None] * len(runs)
    assert_identical(runs)
    assert_near(runs[0], one_process([{name: drawn(name, step + 1) for name in SHAPES} for step in range(2)]))


@remembered
def count(kind):
    return ranks.run(faults_runs.collectives, SIZES[kind], kind)[0]


@pytest.mark.parametrize("kind", ["sharded", "owners"])
def test_a_rank_that_dies_in_a_step_fails_the_others_with_their_weights_as_they_were(kind):
    for fatal in range(count(kind)):
        for own in ranks.run(faults_runs.dying, SIZES[kind], kind, fatal, dies=(1,), patience=PATIENCE):
            if own is not None:
                assert own["told"] is not None, fatal
                assert own["unchanged"], fatal
                assert own["seconds"] < 2 * PATIENCE.total_seconds()


def test_a_rank_that_hangs_fails_the_others_within_the_time_of_their_group():
    seconds = PATIENCE.total_seconds()
    for own in ranks.run(faults_runs.hanging, 2, "sharded", 2 * seconds, dies=(1,), patience=PATIENCE):
        if own is not None:
            assert own["told"] is not None
            assert own["unchanged"]
            assert own["seconds"] < 2 * seconds
