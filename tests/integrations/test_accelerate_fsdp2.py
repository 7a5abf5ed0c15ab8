"""accelerate shards a model inside `prepare` and gives the optimizer new parameters; it then trains as one process does."""

import pytest
import torch

from tests.distributed import ranks
from tests.integrations import accelerate_fsdp2_runs as runs

PRESETS = ["Muon", "NorMuon"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(runs.of_rank, 2, PRESETS, tmp_path_factory.mktemp("states"))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_optimizer_of_the_plain_model_trains_the_sharded_one_as_one_process(found, preset):
    model, opt = runs.start(preset)
    runs.train(model, opt, runs.TOKENS)
    for own in found:
        assert own[preset]["sharded"]
        for name, p in model.named_parameters():
            # bf16 products where the CPU multiplies it fast, of gradients summed in another order.
            assert (own[preset]["saved"][name] - p).abs().max() < 2e-2 * p.abs().max(), name


@pytest.mark.parametrize("preset", PRESETS)
def test_what_accelerate_has_saved_continues_the_run_bit_for_bit(found, preset):
    for own in found:
        run = own[preset]
        assert all(torch.equal(run["saved"][name], run["loaded"][name]) for name in run["saved"])
        assert all(torch.equal(run["uninterrupted"][name], run["resumed"][name]) for name in run["saved"])
        assert not torch.equal(run["saved"]["1.weight"], run["resumed"]["1.weight"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_new_parameter_has_state_and_ranks_agree(found, preset):
    first, second = (own[preset] for own in found)
    assert all(first["kept"].values())
    assert all(torch.equal(first["resumed"][name], second["resumed"][name]) for name in first["resumed"])
