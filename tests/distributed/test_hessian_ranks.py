"""Under DistributedDataParallel the Hessian is that of the global batch, and training goes on bit for bit as without it."""

from functools import cache

import pytest
import torch

from tests.distributed import hessian_runs, ranks

pytestmark = pytest.mark.xdist_group("ranks")

SIZE = 2

runs = ranks.remembered(lambda: ranks.run(hessian_runs.of_rank, SIZE))


@cache
def one_process():
    return hessian_runs.measured(hessian_runs.model(norm=False), *(hessian_runs.batch(0, rank) for rank in range(SIZE)))


def test_gradient_products_and_curvature_are_those_of_one_process_on_the_joined_batch():
    expected = one_process()
    for own in runs():
        found = own["measured"]
        for name in ("gradient", "product", "product of micro-batches"):
            for a, b in zip(found[name], expected[name.removesuffix(" of micro-batches")], strict=True):
                # Sums in another order, in fp64.
                assert (a - b).abs().max() < 1e-14
        for name in ("loss", "J", "L"):
            assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-12)
        assert found["mistake"] < 1e-5


def test_every_rank_measures_the_same():
    first, second = (own["measured"] for own in runs())
    for name in first:
        pairs = zip(first[name], second[name], strict=True) if isinstance(first[name], tuple) else [(first[name], second[name])]
        assert all(torch.equal(a, b) for a, b in pairs)


def same(a, b):
    return all(same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("when", ["before", "after forward", "after backward"])
def test_training_with_batch_norm_and_dropout_is_the_same_to_the_bit(when):
    for own in runs():
        assert same(own[when], own["None"])


def test_buffers_differ_where_the_turn_of_broadcasting_is_not_restored():
    assert any(not same(own["forgetful"], own["None"]) for own in runs())


def test_shards_are_refused_with_the_shape_and_a_way_out():
    for own in runs():
        assert "(4, 2)" in own["refusal"] and "copy of the model" in own["refusal"]
