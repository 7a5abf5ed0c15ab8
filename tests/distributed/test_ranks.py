"""The harness of rank tests: what ranks return, how failures are shown, and that nothing is left running."""

import multiprocessing
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")


def total(rank, size, start):
    t = torch.full((), start + rank)
    dist.all_reduce(t)
    return {"sum": t, "size": size}


def failing(rank, size):
    if rank == 1:
        print("seen before the end")
        raise RuntimeError("what went wrong")
    time.sleep(60)


def warning(rank, size):
    warnings.warn("something deprecated", stacklevel=1)


def ending(rank, size):
    dist.barrier()
    if rank == 1:
        # Not while another still connects.
        time.sleep(0.5)
        os._exit(3)
    return rank


def hanging(rank, size):
    time.sleep(60)


def test_ranks_form_a_group_and_return_what_they_found():
    assert run(total, 3, 10) == [{"sum": torch.tensor(33), "size": 3}] * 3


def test_a_failure_of_one_rank_ends_the_others_and_is_shown():
    with pytest.raises(AssertionError, match=r"(?s)Ranks \[0, 1\] of failing(?=.*seen before the end).*what went wrong"):
        run(failing, 2, grace=0.1)
    assert not multiprocessing.active_children()


def test_warnings_of_ranks_are_errors():
    with pytest.raises(AssertionError, match="something deprecated"):
        run(warning, 1)


def test_a_rank_may_die_where_that_is_the_test():
    assert run(ending, 2, dies=(1,)) == [0, None]
    with pytest.raises(AssertionError, match=r"Ranks \[1\] of ending"):
        run(ending, 2)


def test_ranks_that_hang_are_ended():
    with pytest.raises(AssertionError, match=r"Ranks \[0\] of hanging"):
        run(hanging, 1, timeout=0.5)
    assert not multiprocessing.active_children()
