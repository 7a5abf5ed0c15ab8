"""A monitor gives every rank the numbers of one process, changes no weight, and writes once."""

import math

import pytest

from tests.distributed import monitor_runs, ranks
from tests.distributed.monitor_runs import KINDS

pytestmark = pytest.mark.xdist_group("ranks")

# Sums in fp64 in another order, and what an orthogonalisation in fp32 makes of them.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return ranks.run(monitor_runs.of_rank, 2, str(tmp_path_factory.mktemp("written")))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return monitor_runs.monitored(0, 1, "one process", str(tmp_path_factory.mktemp("one")))


def assert_near(own, expected, name=""):
    assert [record["name"] for record in own] == [record["name"] for record in expected]
    for record, other in zip(own, expected, strict=True):
        assert record.keys() == other.keys(), record["name"]
        for key, value in other.items():
            if isinstance(value, float) and not math.isnan(value):
                assert record[key] == pytest.approx(value, rel=CLOSE, abs=1e-9), (name, record["name"], key)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_sees_what_one_process_sees(runs, one_process, kind):
    assert len(one_process["records"][0]) > 6
    for own in runs:
        # In the last step a gradient is not there on one rank.
        for step in range(monitor_runs.STEPS - 1):
            assert_near(own[kind]["records"][step], one_process["records"][step], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_no_bit_of_a_weight_also_where_a_rank_has_no_gradient(runs, kind):
    assert [own[kind]["same"] for own in runs] == [True, True]
    assert all(len(own[kind]["records"][-1]) for own in runs)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_0_alone_writes(runs, kind):
    assert [own[kind]["written"] for own in runs] == [True, False]


def test_curvature_under_ddp_is_that_of_the_batch_of_all_ranks(runs):
    expected = monitor_runs.curved(0, 1, "one process")
    assert {"curvature/J", "curvature/L"} < set(expected[0])
    for own in runs:
        assert_near(own["DDP"], expected)


def test_updates_that_overlap_with_the_next_forward_are_measured_as_others(runs):
    expected = monitor_runs.overlapped(0, 1, "one process")
    assert expected[0]["update/rms"] > 0
    for own in runs:
        assert_near(own["overlap"], expected)


def test_a_weight_that_is_cut_along_its_columns_is_measured_whole(runs):
    expected = monitor_runs.by_columns(0, 1, "one process")
    for own in runs:
        assert_near(own["columns"], expected)


def test_curvature_of_sharded_parameters_is_refused_with_the_way_out(runs):
    for own in runs:
        assert own["refused"].startswith("TypeError: curvature needs products with the Hessian, but up.weight is a DTensor")
        assert "on a copy of the model on one process" in own["refused"]
