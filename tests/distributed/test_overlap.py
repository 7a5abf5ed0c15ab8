"""Overlap changes no bit of any weight: in placements, where ranks differ, and where a loop reads weights between steps.

What it cannot allow is refused on all ranks, before anything has changed.
"""

from datetime import timedelta
from functools import cache

import pytest
import torch
from torch import nn

import schatten
from schatten.placements.units import units
from tests.distributed import overlap_runs, ranks
from tests.distributed.overlap_runs import BUCKETS, COLLECTIVES, MISUSES, ONE, READINGS, SCENARIOS, SEVERAL, STEPS

pytestmark = pytest.mark.xdist_group("ranks")

# Averages, second moments at the owner, signals that read how many steps there were, rules whose owner takes the whole step,
# and rounding by chance.
RUNS = {
    2: [
        ("FSDP2", "Muon", SEVERAL, "float32"),
        ("FSDP2", "Muon", ONE, "float32"),
        ("FSDP2", "NorMuon", SEVERAL, "float32"),
        ("FSDP2", "SpectralAdam", SEVERAL, "float32"),
        ("FSDP2", "SOAPMuon", SEVERAL, "float32"),
        ("FSDP2", "Hyperball", SEVERAL, "float32"),
        ("FSDP2", "AdaMuon", SEVERAL, "bfloat16"),
        ("tensor parallel", "Muon", SEVERAL, "float32"),
        ("DDP, owners", "Muon", SEVERAL, "float32"),
        ("DDP, zero1", "NorMuon", SEVERAL, "float32"),
    ],
    3: [("FSDP2", "Muon", SEVERAL, "float32")],
    4: [("HSDP", "NorMuon", SEVERAL, "float32"), ("FSDP2 and tensor parallel", "Muon", SEVERAL, "float32")],
}

KINDS = {3: ["sharded", "owners", "zero1"], 4: ["copies of shards"]}

PATIENCE = timedelta(seconds=3)


@cache
def found(size):
    if size == 2:
        return ranks.run(overlap_runs.on_two, 2, RUNS[2], timeout=300)
    return ranks.run(overlap_runs.on_more, size, RUNS[size], KINDS[size], timeout=300)


@pytest.mark.parametrize(("size", "i"), [(size, i) for size, runs in RUNS.items() for i in range(len(runs))])
def test_weights_and_state_are_those_of_steps_without_overlap(size, i):
    for own in found(size):
        assert own["placements"][i]["differs"] == []


@pytest.mark.parametrize(("size", "i"), [(size, i) for size, runs in RUNS.items() for i in range(len(runs))])
def test_every_bucket_starts_in_backward_where_it_may_and_comes_back_after_the_step(size, i):
    name, _, max_bytes, _ = RUNS[size][i]
    for own in found(size):
        run = own["placements"][i]
        assert len(run["ahead"]) == len(run["waiting"]) == STEPS
        for ahead, waiting in zip(run["ahead"], run["waiting"], strict=True):
            # One bucket of what travels and one of the experts that stay whole on their rank.
            assert waiting == 2 if max_bytes == ONE else waiting > 5
            # A DistributedDataParallel module reduces gradients after the hooks of its parameters.
            assert sum(started for started, _ in ahead) == (0 if "DDP" in name else waiting)


CASES = [(size, kind, name) for size, kinds in KINDS.items() for kind in kinds for name in SCENARIOS]


@pytest.mark.parametrize("buckets", BUCKETS)
@pytest.mark.parametrize(("size", "kind", "name"), CASES)
def test_ranks_that_differ_step_as_without_overlap(size, kind, name, buckets):
    for own in found(size):
        plain, overlapped = own["differing"][f"{kind}, {name}, {buckets}"]
        assert all(torch.equal(overlapped["weights"][key], W) for key, W in plain["weights"].items())
        assert (overlapped["steps"], overlapped["skipped"]) == (plain["steps"], plain["skipped"])
        assert overlapped.get("told") == plain.get("told")


@pytest.mark.parametrize(("size", "kind"), [(3, "sharded"), (4, "copies of shards")])
def test_they_do_differ_in_what_they_have_sent_and_computed_before_a_step(size, kind):
    runs = [own["differing"] for own in found(size)]
    assert len({run[f"{kind}, missing, a bucket each"][1]["started"] for run in runs}) > 1
    for buckets in BUCKETS:
        assert [run[f"{kind}, behind, {buckets}"][1]["computed"] == 0 for run in runs] == [rank == 1 for rank in range(size)]


@pytest.mark.parametrize("misuse", [misuse.__name__ for misuse in MISUSES])
def test_what_was_sent_and_has_changed_is_refused_on_all_ranks_and_the_next_step_is_as_ever(misuse):
    for own in found(2):
        outcome = own["misused"][misuse]
        assert outcome["told"] is not None and "No weight was changed" in outcome["told"]
        assert outcome["unchanged"]
        assert outcome["told next"] is None
        assert outcome["differs"] == []


def test_one_rank_is_told_what_it_did_and_the_others_which_rank_did_it():
    others, own = (own["misused"]["clipped_by_one"]["told"] for own in found(2))
    assert "'b' of shape (5, 3)" in own and "backward=False" in own
    assert "Rank 1" in others


def test_a_step_that_is_discarded_leaves_no_trace():
    assert [own["discarded"] for own in found(2)] == [[], []]


def test_gradients_may_be_changed_after_backward_where_only_updates_overlap():
    assert [own["changed after backward"] for own in found(2)] == [[], []]


def test_gradients_are_freed_while_updates_are_on_their_way():
    assert [own["freed"] for own in found(2)] == [0, 0]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("placement", ["FSDP2", "DDP, owners"])
def test_updates_are_in_the_weights_that_are_read_between_steps(placement, reading):
    for own in found(2):
        assert own["read"][f"{placement}, {reading}"] == []


@pytest.mark.parametrize(
    ("wrong", "why"), [("unsharded", "unshard()"), ("edited", "was written to"), ("read before", "has read the weight")]
)
def test_weights_that_nobody_has_waited_for_are_not_used_unseen(wrong, why):
    for own in found(2):
        assert why in own["wrongly read"][wrong]
        assert ("broken off" in own["wrongly read"][f"{wrong}, then the optimizer's state dict"]) == (wrong == "edited")


def test_what_cannot_overlap_is_refused_when_it_is_asked_for():
    for own in found(2):
        told = own["wrongly asked"]
        assert "'a' of shape (6, 4) is not in it" in told["another model"]
        assert "close()" in told["twice"]
        assert "JaguarMuon" in told["no backward"]


@pytest.mark.parametrize("fatal", range(COLLECTIVES))
def test_a_rank_that_dies_fails_the_others_with_weights_as_they_were_or_a_step_that_cannot_be_saved(fatal):
    for own in ranks.run(overlap_runs.dying, 2, fatal, dies=(1,), patience=PATIENCE):
        if own is not None:
            assert own["told"]
            assert own["unchanged"] or "broken off" in own["saved"]
            # Nothing moves before ranks agree, in the last but one at the earliest.
            assert own["unchanged"] or fatal == COLLECTIVES - 1
            assert own["seconds"] < 2 * PATIENCE.total_seconds()


def test_one_process_has_nothing_to_overlap_and_steps_as_ever():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with schatten.Muon(model).overlap(model) as handle:
        handle.finish()
        assert not handle.lanes and not handle.waiting


class Attention(nn.Module):
    """Reads the weight of a child without calling it, as `nn.MultiheadAttention` does."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2)
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.zeros(2))])])


def test_a_unit_is_the_innermost_element_of_a_list_that_is_called():
    block = Attention()
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), block), nn.Linear(2, 2))
    first, last = model[0], model[1]
    of = {id(p): unit.modules for unit in units(model) for p in unit.parameters}
    assert of[id(block.out.weight)] == [block]
    assert of[id(block.experts[0].weight)] == [block.experts[0]]
    assert of[id(block.experts[1][0])] == [block]
    assert of[id(first[0].weight)] == [first[0]]
    assert of[id(last.weight)] == [last]


def test_a_shared_parameter_is_of_every_unit_that_has_it():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    assert [model[0].weight in unit.parameters for unit in units(model) if unit.parameters] == [True, True]
