"""torch.distributed.checkpoint takes an optimizer apart by parameter names and together again, in memory and in folders.

torch's own [Muon, AdamW] cannot be loaded so while a layer has had no gradient; here state is there from the first moment.
"""

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import schatten
from tests.distributed.ranks import run
from tests.integrations import dcp_runs as runs

# torch says that it saves and loads in a single process, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")

OPTIONS = {
    "as it is": None,
    "full": StateDictOptions(full_state_dict=True),
    "full on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def options(request):
    return request.param


def assert_same(one, other):
    for p, q in zip(runs.values(one), runs.values(other), strict=True):
        assert torch.equal(p, q)


def test_state_set_by_names_continues_the_run_with_a_layer_that_never_had_a_gradient(preset, options):
    model, opt = runs.start(preset)
    runs.train(model, opt, range(3))
    twin, twin_opt = runs.start(preset)
    twin.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, opt, options=options)
    set_optimizer_state_dict(twin, twin_opt, saved, options=options)
    assert set(twin_opt.metrics()["without_gradient"]) == {"unused.weight", "unused.bias"}
    runs.train(model, opt, range(3, 5))
    runs.train(twin, twin_opt, range(3, 5))
    assert_same(model, twin)


def test_a_saved_folder_continues_the_run(tmp_path, options):
    model, opt = runs.start()
    runs.train(model, opt, range(3))
    runs.save(model, opt, tmp_path, options)
    runs.train(model, opt, range(3, 6))
    twin, twin_opt = runs.start()
    runs.load(twin, twin_opt, tmp_path, options)
    runs.train(twin, twin_opt, range(3, 6))
    assert_same(model, twin)


def test_a_folder_of_another_rule_is_refused(tmp_path):
    runs.save(*runs.start(scale="keller"), tmp_path)
    with pytest.raises(ValueError, match="of another rule"):
        runs.load(*runs.start(), tmp_path)


def test_state_without_a_parameter_is_refused_by_its_name():
    model, opt = runs.start()
    saved = get_optimizer_state_dict(model, opt)
    del saved["state"]["unused.weight"]
    with pytest.raises(RuntimeError, match=r"Missing optimizer state for parameter 'unused.weight'"):
        set_optimizer_state_dict(model, opt, saved)
    # torch lets it pass when told to, and then it is ours to refuse.
    with pytest.raises(ValueError, match=r"'unused.weight'"):
        set_optimizer_state_dict(model, opt, saved, options=StateDictOptions(strict=False))


def test_unequal_blocks_keep_the_names_of_their_state(options):
    def start():
        return runs.start(schatten.NorMuon, rules=[("hidden.weight", "spectral", {"layout": schatten.Layout(split=(4, 2))})])

    model, opt = start()
    runs.train(model, opt, range(3))
    twin, twin_opt = start()
    twin.load_state_dict(model.state_dict())
    saved = get_optimizer_state_dict(model, opt, options=options)
    set_optimizer_state_dict(twin, twin_opt, saved, options=options)
    runs.train(model, opt, range(3, 5))
    runs.train(twin, twin_opt, range(3, 5))
    assert any(key.endswith(".1") for state in opt.state.values() for key in state)
    assert_same(model, twin)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """A folder that two ranks under DDP saved, and what each saw."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run(runs.of_rank, 2, folder)


def test_two_ranks_under_ddp_resume_to_the_uninterrupted_run_and_agree(ranks):
    _, (first, second) = ranks
    for seen in (first, second):
        assert all(torch.equal(p, q) for p, q in zip(seen["uninterrupted"], seen["resumed"], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(first["resumed"], second["resumed"], strict=True))


def test_one_process_loads_what_two_ranks_have_saved(ranks):
    folder, (first, _) = ranks
    model, opt = runs.start()
    runs.load(model, opt, folder)
    assert all(torch.equal(p, q) for p, q in zip(runs.values(model), first["saved"], strict=True))
    assert [group["step"] for group in opt.param_groups] == [3, 3]
    assert set(opt.metrics()["without_gradient"]) == {"unused.weight", "unused.bias"}
