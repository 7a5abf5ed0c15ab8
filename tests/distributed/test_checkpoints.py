"""Checkpoints move between any numbers of ranks and placements, bit for bit, and the run goes on as it would have."""

import re
from pathlib import Path

import pytest
import torch

import schatten
from tests.distributed import checkpoint_passing as passing
from tests.distributed import checkpoint_runs as runs
from tests.distributed import ranks
from tests.distributed.checkpoint_parts import Run, state, stepped
from tests.distributed.parity_runs import BOUNDS, difference, identical
from tests.distributed.ranks import remembered

pytestmark = pytest.mark.xdist_group("ranks")

# Sums in another order, as in `tests/distributed/test_parity.py`.
BOUND = BOUNDS["fp32"]

# What is saved on four ranks: every placement, and every form of state.
SAVED = (
    Run("FSDP2", "NorMuon"),
    Run("HSDP", "SOAPMuon"),
    Run("zero1", "SOAPMuon"),
    Run("owners", "NorMuon"),
    Run("tensor parallel", "Hyperball"),
    Run("FSDP2 and tensor parallel", "NorMuon"),
    Run("FSDP2", "Muon", "bfloat16", "kahan"),
)

# By the number of ranks: which of these is loaded, and in which placement.
LOADED = {
    1: [(0, "one process"), (2, "one process"), (4, "FSDP2"), (6, "one process")],
    2: [(0, "owners"), (1, "zero1"), (2, "FSDP2"), (3, "HSDP"), (5, "tensor parallel"), (6, "FSDP2 and tensor parallel")],
    3: [(0, "FSDP2"), (1, "FSDP2"), (2, "owners"), (3, "zero1"), (4, "tensor parallel"), (5, "FSDP2"), (6, "FSDP2")],
}

CASES = [(size, *case) for size, cases in LOADED.items() for case in cases]

PASSED_ON = (Run("FSDP2", "NorMuon"), Run("zero1", "NorMuon"), Run("FSDP2 and tensor parallel", "Hyperball"))

# Through so many ranks in turn.
LEGS = (1, 2, 4, 3)

ELSEWHERE = {1: ["one process", "FSDP2"], 2: ["FSDP2", "DDP"], 3: ["FSDP2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def different(one, other):
    """Names of tensors that differ in a bit or in their dtype."""
    assert one.keys() == other.keys()
    return [name for name, t in one.items() if t.dtype != other[name].dtype or not torch.equal(t, other[name])]


# -- a training that moves -------------------------------------------------------------------------------------------------


@remembered
def trained(folder):
    return ranks.run(runs.trained, 4, folder / "trained")


@remembered
def moved(folder):
    """Weights of each leg, and of what was saved on four ranks and went on elsewhere."""
    trained(folder)
    found, before = [], None
    for leg, size in enumerate(LEGS):
        found.append(ranks.run(runs.elsewhere, size, folder / "trained", ELSEWHERE.get(size, []), before, leg)[0])
        before = folder / "trained" / f"leg {leg}"
    return found


def test_a_training_on_four_ranks_resumes_bit_for_bit(folder):
    first, *others = trained(folder)
    uninterrupted, resumed = first
    assert identical(uninterrupted, resumed)
    assert all(identical(uninterrupted, weights) for found in others for weights in found)


@pytest.mark.parametrize(("size", "placement"), [(size, p) for size, placements in ELSEWHERE.items() for p in placements])
def test_it_goes_on_elsewhere_as_the_uninterrupted_run(folder, size, placement):
    assert difference(moved(folder)[LEGS.index(size)][placement], trained(folder)[0][0]) < BOUND


def test_it_moves_through_one_two_four_and_three_ranks_as_one_process_trains(folder):
    (expected,) = ranks.run(runs.undivided, 1, 2 * len(LEGS))
    assert difference(moved(folder)[-1]["leg"], expected) < BOUND


# -- every placement and every state ---------------------------------------------------------------------------------------


@remembered
def saved(folder):
    return ranks.run(runs.saves, 4, folder, list(SAVED))


@remembered
def loaded(folder, size):
    saved(folder)
    cases = [(i, SAVED[i]._replace(placement=placement)) for i, placement in LOADED[size]]
    return ranks.run(runs.loads, size, folder, cases)


@pytest.mark.parametrize("i", range(len(SAVED)), ids=[" ".join(run) for run in SAVED])
def test_the_same_ranks_resume_bit_for_bit(folder, i):
    first, *others = [found[i] for found in saved(folder)]
    assert not different(first["uninterrupted"], first["resumed"])
    assert all(not different(first[when], other[when]) for other in others for when in first)


@pytest.mark.parametrize(("size", "i", "placement"), CASES, ids=[f"{SAVED[i].placement} to {p} {n}" for n, i, p in CASES])
def test_other_ranks_load_every_bit_and_go_on(folder, size, i, placement):
    at_four, here = saved(folder)[0][i], [found[LOADED[size].index((i, placement))] for found in loaded(folder, size)]
    assert all(not different(at_four["saved"], own["loaded"]) for own in here)
    assert all(difference(own["continued"], at_four["uninterrupted"]) < BOUND for own in here)


# -- dictionaries and files ------------------------------------------------------------------------------------------------


@remembered
def passed_on(folder):
    return ranks.run(passing.dictionaries, 4, folder, list(PASSED_ON))


@pytest.mark.parametrize("i", range(len(PASSED_ON)), ids=[run.placement for run in PASSED_ON])
def test_state_arrives_by_every_way_of_passing_it_on(folder, i):
    for found in passed_on(folder):
        own, ways = found[i]["own"], {way: values for way, values in found[i].items() if way != "own"}
        assert len(ways) >= 8
        assert {way: different(own, values) for way, values in ways.items()} == {way: [] for way in ways}


@pytest.mark.parametrize("size", [1, 3])
def test_a_file_loads_on_any_number_of_ranks(folder, size):
    expected = passed_on(folder)[0]
    for found in ranks.run(passing.files, size, folder, [run._replace(placement="FSDP2") for run in PASSED_ON]):
        assert all(not different(own["own"], here) for own, here in zip(expected, found, strict=True))


def test_one_process_without_a_process_group_reads_the_file_of_four_ranks(folder):
    expected = passed_on(folder)[0][0]["own"]
    own = stepped(PASSED_ON[0]._replace(placement="one process"), 1)
    schatten.load(own.opt, folder / "0.pt")
    assert not different(expected, state(own.model, own.opt))


def test_a_state_dict_is_taken_over_from_any_placement_by_any_other():
    placements = ("owners", "zero1", "HSDP", "FSDP2 and tensor parallel")
    for found in ranks.run(passing.other_placements, 4, [Run(p, "NorMuon") for p in placements]):
        assert len(found) == 16
        assert not [pair for pair, (own, theirs) in found.items() if different(own, theirs)]


def test_state_of_torchs_optimizers_is_converted_where_it_is_sharded():
    for found in ranks.run(passing.conversions, 3):
        assert all(len(found[source]) == 2 for source in ("AdamW", "Muon"))
        assert not different(found["AdamW"], found["AdamW, sharded"])
        assert not different(found["AdamW"], found["AdamW, full"])
        assert not different(found["Muon"], found["Muon, sharded"])


# -- refusals --------------------------------------------------------------------------------------------------------------


@remembered
def refused(folder):
    return ranks.run(passing.refusals, 2, folder)


@pytest.mark.parametrize(
    ("what", "rank", "error"),
    [
        (
            "the first rank's part",
            1,
            r"ValueError: .*'up.weight' of shape \(21, 12\): momentum_buffer is the part of another rank",
        ),
        ("nan on the second rank", 1, r"ValueError: .*'up.weight' of shape \(21, 12\): momentum_buffer has inf or nan"),
        ("no file on the first rank", 0, "FileNotFoundError: "),
        ("no folder", 0, "FileNotFoundError: "),
    ],
)
def test_what_one_rank_refuses_no_rank_does(folder, what, rank, error):
    heard = [found["heard"][what] for found in refused(folder)]
    assert re.match(error, heard[rank], re.DOTALL)
    assert heard[1 - rank].startswith(f"RuntimeError: Rank {rank} has refused or failed")


def test_a_refused_load_changes_nothing(folder):
    assert all(found["unchanged"] for found in refused(folder))


def test_a_part_of_a_tensor_is_refused_where_there_are_fewer_ranks(folder):
    passed_on(folder)
    own = stepped(PASSED_ON[0]._replace(placement="one process"), 1)
    part = torch.load(folder / "0 of 0.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"is one part of 4, of a tensor divided among ranks, and there are 1 here") as refusal:
        own.opt.load_state_dict(part)
    assert "schatten.save or torch.distributed.checkpoint" in str(refusal.value)


# -- saves in the background and broken off --------------------------------------------------------------------------------


def test_a_save_in_the_background_is_of_the_moment_of_its_call(folder):
    for found in ranks.run(runs.in_the_background, 2, folder / "background"):
        assert not different(found["saved"], found["loaded"])


def test_the_checkpoint_before_a_broken_off_save_is_usable(folder):
    own = folder / "broken off"
    before, _ = ranks.run(runs.broken_off, 2, own, dies=(1,))
    assert before["heard"] != "nothing"
    # Begun, and never complete.
    assert list((own / "step-000004").glob("*.distcp")) and not (own / "step-000004" / ".metadata").exists()
    for found in ranks.run(runs.after_the_break, 2, own):
        assert found["newest"] == "step-000002"
        assert not different(before["ended"], found["ended"])
        assert found["next"] == "step-000004"
