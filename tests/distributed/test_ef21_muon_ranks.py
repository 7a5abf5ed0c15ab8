"""EF21-Muon on two gloo ranks with gradients of their own: they stay bitwise equal and are one process with two workers."""

import pytest
import torch

from schatten.compressors import Identity
from tests.distributed import ef21_muon_ranks as ranks
from tests.distributed.ranks import run

# Ranks that other tests start beside these would share their cores (`pytest -n 2 --dist loadgroup`).
pytestmark = pytest.mark.xdist_group("ranks")

SIZE = 2


def counts(run):
    """What was counted; norms of gradients are each rank's own, and those of weights known to rounding."""
    counted = (
        "skipped",
        "skipped_total",
        "without_gradient",
        "effective_lr",
        "bytes_to_server",
        "bytes_to_workers",
        "bytes_dense",
    )
    return {key: run["metrics"][key] for key in counted}


@pytest.fixture(scope="module")
def found():
    """What each rank saw."""
    return run(ranks.of_rank, SIZE)


def simulated(choice, change=lambda worker: lambda step, own: own):
    params = ranks.parameters()
    opt = ranks.build(params, choice, workers=SIZE)
    for k in range(ranks.STEPS):
        for j in range(SIZE):
            with opt.worker(j):
                for p, G in zip(params, change(j)(k, ranks.gradients(k, j)), strict=True):
                    p.grad = G
        opt.step()
    return ranks.seen(opt, params)


def assert_equal(found):
    first, second = found
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for one, other in zip(first["state"], second["state"], strict=True):
        for key in set(one) - {"momentum_buffer", "estimate"}:
            assert torch.equal(one[key], other[key]), key
    assert counts(first) == counts(second)


def assert_near(weights, others):
    for a, b in zip(weights, others, strict=True):
        # Sums in another order in fp64, amplified by the condition of estimates of a few entries, below 1e4 here.
        assert (a - b).norm() < 1e-10 * b.norm()


@pytest.mark.parametrize("choice", ranks.CHOICES)
def test_ranks_stay_bitwise_equal_and_are_simulated_workers(found, choice):
    runs = [own[choice] for own in found]
    assert_equal(runs)
    reference = simulated(choice)
    assert_near(runs[0]["weights"], reference["weights"])
    assert counts(runs[0]) == counts(reference)
    for j, own in enumerate(runs):
        for p, (state, expected) in enumerate(zip(own["state"], reference["state"], strict=True)):
            if p < 3:
                assert_near([state["momentum_buffer"]], [expected["momentum_buffer"][j]])
    assert not torch.equal(runs[0]["state"][0]["momentum_buffer"], runs[1]["state"][0]["momentum_buffer"])


@pytest.mark.parametrize("choice", [choice for choice, (C, _) in ranks.CHOICES.items() if C != Identity()])
def test_the_server_knows_the_mean_of_what_it_was_sent(found, choice):
    runs = [own[choice]["state"] for own in found]
    for p in range(3):
        server = runs[0][p]["server_estimate"]
        # Five sums of numbers of size 1 in another order.
        assert (server - sum(run[p]["estimate"] for run in runs) / SIZE).abs().max() < 1e-14
        assert not torch.equal(runs[0][p]["estimate"], runs[1][p]["estimate"])


def test_adamw_is_given_the_mean_of_all_ranks_and_matrices_keep_their_own(found):
    for j, own in enumerate(found):
        last = [ranks.gradients(ranks.STEPS - 1, k) for k in range(SIZE)]
        assert torch.equal(own["top"]["gradients"][0], last[j][0])
        assert (own["top"]["gradients"][3] - (last[0][3] + last[1][3]) / 2).abs().max() < 1e-15


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all_and_counted(found):
    runs = [own["nan"] for own in found]
    assert_equal(runs)
    assert runs[0]["metrics"]["skipped"] == {"0.0": 1, "1.0": 1}
    assert all(value.isfinite().all() for run in runs for state in run["state"] for value in state.values())
    assert_near(runs[0]["weights"], simulated("both ways", ranks.with_nan)["weights"])


def test_a_gradient_missing_on_one_rank_is_zero_and_on_all_none(found):
    runs = [own["missing"] for own in found]
    assert_equal(runs)
    assert [int(state["step"]) for state in runs[0]["state"]] == [5, 4, 5, 5]
    assert runs[0]["metrics"]["skipped_total"] == 0
    assert_near(runs[0]["weights"], simulated("both ways", ranks.with_missing)["weights"])


def test_each_rank_continues_from_its_own_checkpoint_and_from_no_other(found):
    for own in found:
        resumed = own["resumed"]
        assert "another rule" in resumed["foreign"] and "rank=0" in resumed["foreign"] and "rank=1" in resumed["foreign"]
        assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], resumed["uninterrupted"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], own["both ways"]["weights"], strict=True))


def test_a_rank_may_name_itself_as_worker_but_no_other(found):
    for rank, own in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(own["blocks"]["weights"], own["both ways"]["weights"], strict=True))
        assert own["blocks"]["other"] == f"The workers of this process are [{rank}], got {1 - rank}."


def test_a_group_can_be_given_and_its_optimizer_copied(found):
    for own in found:
        assert all(torch.equal(a, b) for a, b in zip(own["groups"]["copy"], own["both ways"]["weights"], strict=True))


def test_a_group_of_one_is_a_process_alone_and_needs_its_member(found):
    params = ranks.parameters()
    ranks.step(ranks.build(params), params, ranks.gradients(0, 0))
    assert all(torch.equal(p, w) for p, w in zip(params, found[0]["groups"]["member"], strict=True))
    assert "not in `group`" in found[1]["groups"]["outside"]


@pytest.mark.parametrize(
    ("what", "way_out"),
    [("weights", "broadcast rank 0's weights"), ("batches", "max_batch_bytes"), ("parameters", "same model on every rank")],
)
def test_ranks_that_differ_are_told_before_anything_changes(found, what, way_out):
    for own in found:
        message, unchanged = own["refusals"][what]
        assert f"Ranks [1] have other {what} than rank 0" in message and way_out in message
        assert unchanged


def test_ranks_cannot_simulate_workers(found):
    assert all("this is one of 2 ranks and each is a worker, got workers=2" in own["refusals"]["workers"] for own in found)
