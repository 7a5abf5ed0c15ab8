"""Ten steps of a GPT agree with one process in every placement on 1, 2, 3 and 4 ranks, and ranks hold the same bits."""

from pathlib import Path

import pytest

from tests.distributed import parity_runs, ranks
from tests.distributed.parity_runs import BOUNDS, difference, identical, on
from tests.distributed.ranks import remembered

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")

SIZES = (1, 2, 3, 4)

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


@remembered
def found(size: int) -> dict[str, list[parity_runs.Weights]]:
    """The weights on each rank after the steps in every placement on so many ranks, with fp32 products."""
    runs = [(placement, "Muon", "float32", "float32") for placement in on(size)]
    of_ranks = ranks.run(parity_runs.of_rank, size, runs)
    return {run[0]: [own[i] for own in of_ranks] for i, run in enumerate(runs)}


@remembered
def one_process(*rule: str) -> parity_runs.Weights:
    return ranks.run(parity_runs.of_rank, 1, [("one process", *rule)])[0][0]


SHORT = [
    (placement, "Muon", "bfloat16", weights)
    for placement in ("DDP, owners", "FSDP2", "tensor parallel, together")
    for weights in ("float32", "bfloat16")
]


@remembered
def in_half_precision() -> list[list[parity_runs.Weights]]:
    return ranks.run(parity_runs.of_rank, 2, SHORT)


PLACED = [(placement, size) for size in SIZES for placement in on(size)]


@pytest.mark.parametrize(("placement", "size"), PLACED)
def test_every_placement_agrees_with_one_process(placement, size):
    reference = one_process("Muon", "float32", "float32")
    assert difference(found(size)[placement][0], reference) < BOUNDS["fp32"]


@pytest.mark.parametrize(("placement", "size"), PLACED)
def test_ranks_hold_the_same_bits(placement, size):
    first, *others = found(size)[placement]
    assert all(identical(first, own) for own in others)


@pytest.mark.parametrize("placement", ["DDP, owners", "FSDP2", "tensor parallel, together"])
@pytest.mark.parametrize(("bound", "dtypes"), [("bf16 products", ("bfloat16", "float32")), ("bf16 weights", ("bfloat16",) * 2)])
def test_half_precision_stays_within_its_bound(placement, bound, dtypes):
    first, second = (own[SHORT.index((placement, "Muon", *dtypes))] for own in in_half_precision())
    assert difference(first, one_process("Muon", *dtypes)) < BOUNDS[bound]
    assert identical(first, second)


def test_the_page_has_a_row_for_each_placement_within_the_bounds():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    table = {(row[0], int(row[1])): row[2:] for row in rows if len(row) == 6 and row[1].isdigit()}
    assert list(table) == PLACED
    for *numbers, same in table.values():
        assert all(float(number) < bound for number, bound in zip(numbers, BOUNDS.values(), strict=True))
        assert same == "yes"
