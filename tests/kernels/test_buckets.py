"""Tables of numbers on a device: remembered, bounded, and copied no more often than they change."""

import torch

from schatten.kernels import Bucket, Tables
from schatten.kernels.bucket import REMEMBERED

CPU = torch.device("cpu")


def test_a_table_holds_what_it_was_asked_to_in_the_dtype_asked_for() -> None:
    found = Tables().of((3, 2**40, -1), torch.int64, CPU)
    assert found.dtype == torch.int64 and found.tolist() == [3, 2**40, -1]
    assert Tables().of((0.5, 2.0), torch.float64, CPU).dtype == torch.float64


def test_equal_values_are_copied_once_and_others_apart() -> None:
    tables = Tables()
    first = tables.of((1, 2), torch.int64, CPU)
    assert tables.of((1, 2), torch.int64, CPU) is first
    assert tables.of((2, 1), torch.int64, CPU) is not first
    # Equal as keys of a dictionary, but not the same table.
    assert tables.of((1.0, 2.0), torch.float32, CPU).dtype == torch.float32


def test_only_the_tables_used_last_are_remembered() -> None:
    tables = Tables()
    kept, lost = tables.of((-1,), torch.int64, CPU), tables.of((-2,), torch.int64, CPU)
    for k in range(REMEMBERED - 1):
        tables.of((k,), torch.int64, CPU)
        assert tables.of((-1,), torch.int64, CPU) is kept
    assert len(tables._known) == REMEMBERED
    again = tables.of((-2,), torch.int64, CPU)
    assert again is not lost and torch.equal(again, lost)


def test_addresses_follow_offsets_and_the_order_of_buckets() -> None:
    a, b, c = (torch.zeros(9, dtype=torch.bfloat16) for _ in range(3))
    bucket = Bucket([a, b], (1, 2, 3), (6, 3, 1), offset=3)
    assert bucket.addresses() == (a.data_ptr() + 6, b.data_ptr() + 6)
    assert (len(bucket), bucket.dtype, bucket.device) == (2, torch.bfloat16, CPU)
    found = Tables().addresses(bucket, [c])
    assert found.dtype == torch.int64 and found.tolist() == [*bucket.addresses(), c.data_ptr()]


def test_the_same_places_are_not_copied_again_and_a_new_one_is() -> None:
    tables, a, b = Tables(), torch.zeros(4), torch.zeros(4)
    first = tables.addresses([a], [b])
    a += 1
    assert tables.addresses([a], [b]) is first
    assert tables.addresses([b], [a]) is not first
    assert tables.addresses([a.clone()], [b]) is not first
