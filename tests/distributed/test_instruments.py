"""What is around a step gives every rank the numbers of one process, changes what one process changes, or says why not."""

from functools import cache

import pytest
import torch

from tests.distributed import instrument_runs, ranks
from tests.distributed.faults_runs import KINDS
from tests.distributed.instrument_runs import CLIPS, MODELS, SCENARIOS

pytestmark = pytest.mark.xdist_group("ranks")

SIZES = {"sharded": 3, "owners": 3, "zero1": 3, "copies of shards": 4}

# Sums in fp64 in another order, and what an orthogonalisation makes of them.
CLOSE = 1e-9


@cache
def attempt(size):
    try:
        return ranks.run(instrument_runs.of_rank, size)
    except AssertionError as error:  # for all tests, as another attempt would take as long
        return error


def of_ranks(size):
    if isinstance(outcome := attempt(size), AssertionError):
        raise outcome
    return outcome


def found(name, kind):
    """What each rank saw."""
    return [own[f"{name}, {kind}"] for own in of_ranks(SIZES.get(kind, 3))]


@cache
def one_process(name):
    return SCENARIOS[name](0, 1, "one process")


def assert_near(own, expected, close=CLOSE, where=""):
    """Equal keys, and numbers and tensors equal within rounding."""
    if isinstance(expected, dict):
        assert own.keys() == expected.keys(), where
        for key in expected:
            assert_near(own[key], expected[key], close, f"{where}, {key}")
    elif isinstance(expected, torch.Tensor):
        assert (own - expected).abs().max() <= close * max(1.0, float(expected.abs().max())), where
    elif isinstance(expected, float):
        assert own == pytest.approx(expected, rel=close, abs=close), where
    else:
        assert own == expected, where


def assert_identical(runs):
    first, *others = runs
    for own in others:
        assert instrument_runs.same(own, first)


# -- metrics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_one_process_on_every_rank(kind):
    runs = [own["metrics"] for own in found("metrics", kind)]
    expected = one_process("metrics")["metrics"]
    assert [m is not None for m in expected] == [False, True] * 2
    for own in runs:
        assert [m is not None for m in own] == [False, True] * 2
        for k in (1, 3):
            assert own[k]["measured_step"] == k + 1
            assert_near(own[k], expected[k])
            assert len(own[k]["update_rms"]) == 7 and len(own[k]["orthogonality_error"]) == 6
        assert own[3]["skipped"] == {"tall": 1, "bank": 1, "table": 1}
    assert_identical([own[3] for own in runs])


def test_what_ranks_compute_together_is_measured_as_on_one_process():
    expected = one_process("metrics")["metrics"]
    for own in found("together", "sharded"):
        for k in (1, 3):
            assert_near(own["metrics"][k], expected[k])
        # The products of each measured batch.
        assert len(own["sent"][1]) > len(own["sent"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_changes_no_step_and_calls_between_send_nothing(kind):
    runs, expected = found("metrics", kind), one_process("metrics")["weights"]
    for own in runs:
        # The same collectives on steps that are measured as on others.
        assert own["sent"][0] == own["sent"][1] == own["sent"][2] == own["sent"][3]
        assert [n > 0 for n in own["calls"]] == [False, True] * 2
        assert_near(own["weights"], expected)


PLACEMENTS = {
    # Experts, a lone row and two of the unequal blocks lie on one rank each.
    "sharded": "placement: sharded over 3 ranks, 3 of 9 matrices travel",
    "copies of shards": "placement: sharded over 4 ranks (2 x 2), 9 of 9 matrices travel",
    "owners": "placement: owners, 3 ranks, 9 of 9 matrices travel",
    "zero1": "placement: zero1, 3 ranks, 9 of 9 matrices travel",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_ends_with_where_its_parameters_lie_and_how_many_matrices_travel(kind):
    assert {own["plan"] for own in found("metrics", kind)} == {PLACEMENTS[kind]}
    assert one_process("metrics")["plan"] == "adamw: 2 tensors, 32 parameters"


# -- clipping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", CLIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped_by_the_norms_of_all_ranks(kind, how):
    norms, gradients = one_process("clip")[how]
    runs = [own[how] for own in found("clip", kind)]
    for own_norms, own in runs:
        # Norms are given in fp32.
        assert_near(own_norms, norms, close=2e-7 * max(1.0, float(norms["spectral"])))
        for name in gradients:
            assert (own[name] - gradients[name]).norm() <= CLOSE * gradients[name].norm()
    assert_identical([norms for norms, _ in runs])


@pytest.mark.parametrize("kind", ["sharded", "copies of shards"])
def test_norms_are_the_same_on_ranks_that_lack_a_gradient_or_have_one_that_is_not_finite(kind):
    runs = found("clip", kind)
    assert_identical([own["spoilt"] for own in runs])
    norms = runs[0]["spoilt"]
    # Of two copies the first one counts, and the step will skip what differs in the other.
    assert norms["adamw"].isfinite() == (kind == "copies of shards") and norms["spectral"].isfinite()
    assert kind == "copies of shards" or all(own["unchanged"] for own in runs)


# -- self test -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sharded", "owners", "zero1"])
def test_the_self_test_checks_as_on_one_process_and_leaves_no_trace(kind):
    expected = one_process("self test")
    assert all(ok for _, _, ok in expected["checks"])
    for own in found("self test", kind):
        assert own["checks"] == expected["checks"]
        assert own["unchanged"] and own["goes on"]


@pytest.mark.parametrize("kind", ["sharded", "owners", "zero1"])
def test_the_self_test_finds_a_mistake_on_every_rank_and_one_of_a_single_rank_keeps_no_other_waiting(kind):
    for rank, own in enumerate(found("self test", kind)):
        assert own["forgets"].startswith("SelfTestError") and "decay" in own["forgets"]
        if rank == 1:
            assert own["odd"].startswith("SelfTestError") and "routes" in own["odd"]
        elif kind == "sharded":
            assert own["odd"].startswith("RuntimeError: Rank 1 has refused")
        else:
            assert own["odd"] is None


# -- wrappers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ema_nesterov_shifts_shards_as_one_process_shifts_the_whole(kind):
    runs, expected = found("EMA-Nesterov", kind), one_process("EMA-Nesterov")
    for own in runs:
        for what in ("ahead", "behind", "resumed"):
            assert_near(own[what], expected[what])
            assert_near(own["resumed"], own["ahead"])
        assert instrument_runs.same(own["back"], own["ahead"])
        assert not instrument_runs.same(own["behind"], own["ahead"])
        # Six roundings of other noise, each of a unit in the last place.
        assert_near(own["bf16"], expected["bf16"], close=6 * 2**-7)
    assert_identical([own["bf16"] for own in runs])


@pytest.mark.parametrize("kind", ["sharded", "owners", "zero1"])
def test_qk_clip_scales_the_rows_of_a_shard(kind):
    expected = one_process("qk_clip")
    for own in found("qk_clip", kind):
        assert instrument_runs.same(own["grouped"], expected["grouped"])
        assert instrument_runs.same(own["rotary"], expected["rotary"])
        assert (own["slice"] or "").startswith("TypeError: query of shape (12, 4)") == (kind == "sharded")


# -- closures ------------------------------------------------------------------------------------------------------------


@cache
def on_one(name):
    run = {
        "MVR": instrument_runs.reduced,
        "Jaguar": instrument_runs.estimated,
        "replaced": instrument_runs.replaced,
        "overlap": instrument_runs.overlapped,
    }
    return run[name](0, 1, "one process")


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_at_earlier_weights_are_taken_on_all_ranks(kind):
    expected = on_one("MVR")
    assert int(expected["by hand"]["skipped"]) == 1
    for own in found("MVR", kind):
        assert_near(own, expected)


def test_gradients_estimated_from_losses_are_those_of_the_samples_of_all_ranks():
    expected = on_one("Jaguar")
    assert len(set(expected["losses"])) == instrument_runs.STEPS
    runs = found("Jaguar", "owners")
    for own in runs:
        # Differences of losses over 2 eps multiply their rounding by 500.
        assert_near(own, {**expected, "losses": pytest.approx(expected["losses"], rel=1e-9)}, close=1e-7)
    assert_identical(runs)


REASONS = {
    "EF21Muon, FSDP2": ("TypeError", "gradients of its own", "give every rank the whole model"),
    "EF21Muon, DDP": ("TypeError", "averages before", "do not wrap it"),
    "EF21Muon, owners": ("ValueError", "each rank is a worker", "leave placement out"),
    "JaguarMuon, FSDP2": ("TypeError", "without a backward", "DistributedDataParallel"),
    "JaguarMuon, zero1": ("ValueError", "divides among ranks", "placement='owners'"),
    "step_in_backward, FSDP2": ("TypeError", "lies on several ranks", "call step() after backward"),
    "step_in_backward, DDP, local": ("TypeError", "averages gradients after", "call step() after backward"),
    "step_in_backward, DDP": ("TypeError", "lies on several ranks", "call step() after backward"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_cannot_be_is_refused_with_the_reason_and_a_way_out(what):
    kind, why, way_out = REASONS[what]
    for own in of_ranks(3):
        message = own["refusals"][what]
        assert message.startswith(kind) and why in message and way_out in message


# -- what others do with an optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_that_a_scaler_finds_on_one_rank_skips_the_step_on_all(kind):
    runs, expected = found("scaler", kind), one_process("scaler")
    assert set(expected["skipped"].values()) == {1}
    for own in runs:
        assert own["skipped"] == expected["skipped"]
        assert_near(own["weights"], expected["weights"])
        assert_near(own["state"], expected["state"])
        # torch brings the scales of shards together; replicas have the same gradients, which these here have not.
        assert kind != "sharded" or own["scale"] == expected["scale"] == 2.0
    assert_identical([(own["weights"], own["state"], own["skipped"]) for own in runs])


def test_parameters_that_are_replaced_by_their_shards_before_the_first_step_train_as_those():
    expected = on_one("replaced")
    assert expected["paths"] == len(expected["before"]["without_gradient"]) == 6
    for own in found("replaced", "FSDP2"):
        assert_near(own, expected)


def test_weights_are_shifted_from_where_an_overlapped_step_has_taken_them():
    for own in found("overlap", "FSDP2"):
        assert_near(own, on_one("overlap"))
