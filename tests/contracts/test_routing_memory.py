"""Parameters that share memory get one route or raise; flat shards, whose matrices are gone, are refused with what works."""

import pytest
import torch
from torch import distributed, nn

import schatten
from schatten import plan
from schatten.routing.places import overlaps, span
from schatten.routing.sharding import refuse_flat
from tests.facts.routing_models import NanoGPT


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def routes(model, **options):
    return {e.name: e.route for e in plan(model, **options)}


def twins():
    """Two Linears that are two parameters in one memory, as `.data` ties them."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight.data = model[0].weight.data
    return model


def test_row_11_tied_by_data_a_head_has_the_route_of_its_table():
    # Megatron-LM 4641: the replica of a tied embedding was trained by another optimizer, and they drifted apart.
    model = NanoGPT(tie=False)
    model.lm_head.weight.data = model.transformer["wte"].weight.data
    found = {e.name: e for e in plan(model)}
    assert found["lm_head.weight"].route == found["transformer.wte.weight"].route == "adamw"
    assert found["lm_head.weight"].reason == "shares storage with the embedding transformer.wte.weight"


@pytest.mark.parametrize("rule", ["lm_head.weight", "transformer.wte.weight"])
def test_a_rule_for_one_of_two_that_share_memory_is_refused_naming_both(rule):
    model = NanoGPT(tie=False)
    model.lm_head.weight.data = model.transformer["wte"].weight.data
    with pytest.raises(ValueError, match="Parameters that share memory need one route") as error:
        plan(model, rules=[(rule, "spectral")])
    for part in ("transformer.wte.weight", "lm_head.weight", "(96, 32)", f"rule {rule!r}", "add a rule"):
        assert part in str(error.value)
    assert set(routes(model, rules=[("*wte.weight", "spectral"), ("lm_head.weight", "spectral")]).values()) == {
        "spectral",
        "adamw",
    }


def test_views_of_one_memory_need_one_route_too():
    model = twins()
    assert set(routes(model).values()) == {"spectral"}
    with pytest.raises(ValueError, match=r"'0.weight' of shape .* goes to spectral .* and '1.weight' of shape .* to adamw"):
        plan(model, rules=[("1.weight", "adamw")])
    model[1].weight.requires_grad_(False)
    assert routes(model, rules=[("1.weight", "adamw")]) == {"0.weight": "spectral"}


def test_a_row_of_a_weight_that_is_a_parameter_of_its_own():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].gain = nn.Parameter(model[1].weight.data[3])
    with pytest.raises(ValueError, match="share memory need one route"):
        plan(model)


def flattened(model):
    """All parameters as views of one buffer, side by side, as ZeRO-1 and fused all-reduces keep them."""
    buffer, at = torch.zeros(sum(p.numel() for p in model.parameters())), 0
    for p in model.parameters():
        p.data, at = buffer[at : at + p.numel()].view(p.shape), at + p.numel()
    return model


def test_parameters_side_by_side_in_one_buffer_are_not_tied():
    model = flattened(NanoGPT(tie=False))
    assert len({span(p)[0] for p in model.parameters()}) == 1
    assert plan(model) == plan(NanoGPT(tie=False))


def test_views_side_by_side_do_not_overlap_and_views_of_one_place_do():
    buffer = torch.zeros(100)
    views = {"a": buffer[:20], "b": buffer[20:40].view(4, 5), "c": buffer[40:80].view(8, 5), "d": torch.zeros(20)}
    assert overlaps(views) == []
    assert overlaps({**views, "e": buffer[70:90]}) == [("c", "e")]
    assert overlaps({**views, "f": buffer[30:31]}) == [("b", "f")]
    assert {frozenset(pair) for pair in overlaps({"whole": buffer, **views})} == {frozenset(("whole", name)) for name in "abc"}
    assert overlaps({"empty": buffer[10:10], "a": buffer[:20]}) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_is_told_apart_by_storage_on_any_device(device):
    params = {name: torch.zeros(4, 4, device=device) for name in "ab"}
    assert overlaps(params) == []
    assert overlaps({**params, "c": params["a"].view(16)}) == [("a", "c")]


# -- flat shards -------------------------------------------------------------------------------------------------------


def ways_out(error):
    text = str(error.value)
    return "fully_shard (FSDP2)" in text and "DistributedDataParallel" in text and "unsharded" in text


# FSDP1 warns that one rank has nothing to shard.
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_row_9_flat_parameters_of_fsdp1_are_refused(one_rank):
    # verl-SpeCo PR 91, torchrec PR 3844: of one dimension, they all went to AdamW.
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(NanoGPT(False), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'_flat_param' of shape \(\d+,\) is a flat parameter of FSDP1") as error:
        plan(model)
    assert ways_out(error)
    with pytest.raises(ValueError, match="is a flat parameter of FSDP1"):
        schatten.Muon(model)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_row_9_the_original_parameters_under_fsdp1_are_refused_too(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(NanoGPT(False), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"'transformer.wte.weight' of shape .* is a flat parameter of FSDP1 .* or a view of one"
    ):
        plan(model)


def zero_3(model):
    """What deepspeed.zero.Init leaves: an empty tensor with the marks of a partition."""
    for i, p in enumerate(model.parameters()):
        p.data = torch.zeros(0)
        p.ds_id, p.ds_shape, p.ds_tensor = i, (8, 8), torch.zeros(64)
    return model


def test_row_2_parameters_of_zero_3_are_refused():
    # DeepSpeed PR 8438: under zero.Init every parameter looks one-dimensional, and 0 of 14 were orthogonalised.
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(0,\) is partitioned by DeepSpeed's ZeRO-3") as error:
        plan(zero_3(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))))
    assert ways_out(error)


@pytest.mark.parametrize("module", [nn.Linear(8, 8), nn.Conv2d(4, 4, 3), nn.Embedding(8, 8)], ids=lambda m: type(m).__name__)
def test_a_flattened_weight_without_a_mark_is_told_by_its_module(module):
    module.weight = nn.Parameter(module.weight.data.flatten()[:7])
    model = nn.Sequential(nn.Linear(8, 8), module)
    with pytest.raises(ValueError, match=rf"'1.weight' of shape \(7,\) is the flattened weight of a {type(module).__name__}"):
        plan(model)


def test_a_frozen_shard_is_not_the_optimizer_s_business():
    model = nn.Sequential(nn.Linear(8, 8), zero_3(nn.Linear(8, 8)).requires_grad_(False))
    assert plan(model).frozen == 2


def test_whole_parameters_pass():
    for p in (torch.zeros(4, 4), torch.zeros(4), torch.zeros(()), torch.zeros(0)):
        refuse_flat("p", p)
    refuse_flat("p", torch.zeros(4), nn.LayerNorm(4))
    refuse_flat("p", torch.zeros(4), nn.Linear(4, 4), "bias")
