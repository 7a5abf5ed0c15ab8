"""Collectives of a step: two for each bucket and a constant, however many matrices there are."""

import pytest

from tests.distributed import budget_runs, ranks
from tests.distributed.budget_runs import WRAPPERS
from tests.distributed.ranks import remembered

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")

# Besides those of buckets: the agreement at a step's start.
CONSTANT = 1

SIZES = {"DDP": 2, "FSDP2": 2, "HSDP": 4, "tensor parallel": 2}


@remembered
def found(size):
    return ranks.run(budget_runs.of_rank, size, [wrapper for wrapper, own in SIZES.items() if own == size])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_step_has_as_many_collectives_for_sixteen_matrices_as_for_four(wrapper):
    for own in found(SIZES[wrapper]):
        few, many = (own[f"{wrapper}, {matrices}"] for matrices in (4, 16))
        assert [name for name, _ in few] == [name for name, _ in many]
        # All of these are in one bucket.
        assert 0 < len(many) <= 2 + CONSTANT, many


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_less_memory_makes_more_buckets_of_two_collectives_each(wrapper):
    for own in found(SIZES[wrapper]):
        assert own[f"{wrapper}, buckets"] > 1
        assert len(own[f"{wrapper}, 16"]) < len(own[f"{wrapper}, small"]) <= 2 * own[f"{wrapper}, buckets"] + CONSTANT


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2", "HSDP"])
def test_a_gradient_that_is_missing_changes_no_collective(wrapper):
    for own in found(SIZES[wrapper]):
        assert [name for name, _ in own[f"{wrapper}, missing"]] == [name for name, _ in own[f"{wrapper}, 16"]]


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2", "HSDP"])
def test_every_direction_is_computed_once_and_ranks_have_as_many(wrapper):
    size = SIZES[wrapper]
    assert [own[f"{wrapper}, computed"] for own in found(size)] == [16 / size] * size


def test_experts_that_are_divided_among_the_ranks_stay_where_they_are():
    for own in found(2):
        assert [name for name, _ in own["experts"]] == ["allreduce_"]


def test_torch_sends_more_for_each_matrix_than_this_library_for_all():
    few, many = (len(found(2)[0][f"torch.optim.Muon, {matrices}"]) for matrices in (4, 16))
    # For reference, torch 2.13: 15 all-gathers and an all-reduce for each matrix on two ranks.
    assert (many - few) / 12 > 2 + CONSTANT
