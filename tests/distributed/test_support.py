"""The support table of docs/distributed.md is what happens: "yes" trains as one process, "refused" says why on every rank."""

from functools import cache
from pathlib import Path

import pytest

from tests.distributed import ranks, support_runs
from tests.distributed.parity_runs import difference, identical
from tests.distributed.support_runs import FEATURES, PLACEMENTS

pytestmark = pytest.mark.xdist_group("ranks")

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"

# Those on a mesh of two dimensions take four ranks.
SIZES = {"HSDP": 4, "FSDP2 and tensor parallel": 4}

COLUMNS = [name for name in PLACEMENTS if name != "one process"]

# fp32 products of gradients summed in another order. Averages in half precision are rounded by noise that differs from shard to
# shard, and a gradient estimated from losses is their rounding over eps.
BOUNDS = {"bf16 state": 1e-2, "int8 state": 1e-2, "closure without backward": 1e-2}

COLUMN = [pytest.param(name, marks=[pytest.mark.slow] if name in SIZES else []) for name in COLUMNS]


def table():
    """Feature -> placement -> what the page says."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    at = next(i for i, row in enumerate(rows) if row[0] == "feature")
    tried = [row for row in rows[at + 2 :] if len(row) == len(rows[at])]
    return {row[0].strip("`"): dict(zip(rows[at][1:], row[1:], strict=True)) for row in tried}


@cache
def one_process():
    (own,) = ranks.run(support_runs.of_rank, 1, [(feature, "one process") for feature in FEATURES])
    return dict(zip(FEATURES, own, strict=True))


@cache
def found(placement):
    """Feature -> what each rank saw."""
    cells = [(feature, placement) for feature in FEATURES]
    of_ranks = ranks.run(support_runs.of_rank, SIZES.get(placement, 2), cells, timeout=300)
    return {feature: [own[i] for own in of_ranks] for i, feature in enumerate(FEATURES)}


def answer(runs):
    if all("weights" in run for run in runs):
        return "yes"
    assert all("refused" in run for run in runs), "ranks differ"
    return "refused" if all(run["by"] == "schatten" for run in runs) else "torch refuses"


def test_the_page_has_a_row_for_each_feature_and_a_column_for_each_placement():
    assert list(table()) == list(FEATURES)
    assert all(list(row) == COLUMNS for row in table().values())


@pytest.mark.parametrize("placement", COLUMN)
def test_the_page_says_what_happens(placement):
    assert {feature: row[placement] for feature, row in table().items()} == {
        feature: answer(runs) for feature, runs in found(placement).items()
    }


@pytest.mark.parametrize("placement", COLUMN)
def test_what_is_supported_trains_as_one_process_and_ranks_hold_the_same_bits(placement):
    for feature, runs in found(placement).items():
        if answer(runs) == "yes":
            first, *others = (run["weights"] for run in runs)
            assert all(identical(first, own) for own in others), feature
            assert difference(first, one_process()[feature]["weights"]) < BOUNDS.get(feature, 1e-5), feature


@pytest.mark.parametrize("placement", COLUMN)
def test_metrics_are_those_of_one_process_on_every_rank(placement):
    expected = numbers(one_process()["metrics"]["metrics"])
    assert expected
    for run in found(placement)["metrics"]:
        own = numbers(run["metrics"])
        assert own.keys() == expected.keys()
        for key, value in expected.items():
            # Measured on directions, whose error is some of the solver's.
            assert own[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("placement", COLUMN)
def test_a_self_test_passes_and_changes_nothing(placement):
    for run in found(placement)["self_test"]:
        assert run["ok"] and run["unchanged"]


def test_parameters_kept_on_the_host_train_as_one_process():
    for (run,) in ranks.run(support_runs.of_rank, 2, [("plain", support_runs.OFFLOADED)]):
        assert difference(run["weights"], one_process()["plain"]["weights"]) < 1e-5


def numbers(tree, path=""):
    """The numbers in nested dictionaries under one name each."""
    if isinstance(tree, dict):
        return {name: x for key, value in tree.items() for name, x in numbers(value, f"{path}/{key}").items()}
    return {path: float(tree)} if isinstance(tree, (int, float)) and not isinstance(tree, bool) else {}
