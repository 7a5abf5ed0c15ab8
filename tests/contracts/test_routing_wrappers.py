"""A wrapped model has the plan of the model in it, names included, and rules written for either hold for both."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

import schatten
from schatten import plan
from schatten.routing import named_parameters
from tests.facts.routing_models import LAYERS, TOKENS, NanoGPT, ResNet


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def inner_compiled(model):
    model.transformer["h"][0] = compiled(model.transformer["h"][0])
    return model


def checkpointed(model):
    model.transformer["h"][0] = checkpoint_wrapper(model.transformer["h"][0])
    return model


class Lightning(nn.Module):
    """A module of the user's own is no wrapper: its name stays."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()


WRAPPERS = {
    "compiled": compiled,
    "a compiled block": inner_compiled,
    "checkpointed": checkpointed,
    "DataParallel": DataParallel,
    "compiled DataParallel": lambda model: compiled(DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_wrapped_model_has_the_plan_of_the_plain_one(wrap, tie):
    assert plan(wrap(NanoGPT(tie))) == plan(NanoGPT(tie))


@pytest.mark.parametrize("build", [lambda: NanoGPT(), lambda: compiled(NanoGPT(False))], ids=["tied", "compiled"])
def test_a_ddp_model_has_the_plan_of_the_plain_one(one_rank, build):
    assert plan(DistributedDataParallel(build())) == plan(build())


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_rules_for_the_plain_model_hold_for_the_wrapped_one(wrap):
    rules = [("transformer.h.0.attn.c_attn.weight", "adamw", 1e-3), ("transformer.h.*.c_fc.weight", "adamw")]
    assert plan(wrap(NanoGPT()), rules) == plan(NanoGPT(), rules)


def test_rules_for_the_wrapped_name_hold_too():
    model = compiled(NanoGPT(False))
    names = [name for name, _ in model.named_parameters()]
    assert all(name.startswith("_orig_mod.") for name in names)
    found = plan(model, rules=[("_orig_mod.lm_head.weight", "spectral")])
    assert {e.name: e.route for e in found}["lm_head.weight"] == "spectral"


def test_an_optimizer_of_a_wrapped_model_holds_its_parameters_under_plain_names():
    model = compiled(NanoGPT(False))
    opt = schatten.Muon(model)
    groups = {name: p for g in opt.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert {id(p) for p in groups.values()} == {id(p) for p in model.parameters()}
    assert groups.keys() == {name for name, _ in NanoGPT(False).named_parameters()}


def test_a_checkpoint_of_a_wrapped_model_continues_the_plain_one():
    opt = schatten.Muon(compiled(NanoGPT(False)))
    schatten.Muon(NanoGPT(False)).load_state_dict(opt.state_dict())


def test_a_child_called_module_keeps_its_name_in_any_other_class():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 4)

    assert [e.name for e in plan(Holder())] == ["module.weight", "module.bias"]
    assert list(named_parameters(Holder())) == ["module.weight", "module.bias"]


def test_a_head_is_found_inside_a_module_that_holds_nothing_else():
    found = {e.name: e.reason for e in plan(Lightning(ResNet()))}
    assert found["model.fc.weight"] == "output head, named model.fc"


def test_names_are_those_of_named_parameters_for_a_plain_model():
    for model in (NanoGPT(), NanoGPT(False), ResNet(), nn.Linear(2, 2)):
        assert [(n, id(p)) for n, p in named_parameters(model).items()] == [(n, id(p)) for n, p in model.named_parameters()]


def test_frozen_parts_and_shared_modules_of_a_wrapped_model():
    def build():
        model = NanoGPT()
        model.transformer["h"].append(model.transformer["h"][0])
        model.transformer["wte"].weight.requires_grad_(False)
        return model

    found = plan(compiled(build()))
    assert found == plan(build()) and found.frozen == 1
    assert not any(".h.1." in e.name for e in found)
    by_other_name = plan(build(), rules=[("transformer.h.1.attn.c_attn.weight", "adamw")])
    assert {e.name: e.route for e in by_other_name}["transformer.h.0.attn.c_attn.weight"] == "adamw"


def test_fsdp2_shards_have_the_plan_of_the_plain_model(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sharded(tie):
        model, mesh = NanoGPT(tie), init_device_mesh("cpu", (1,))
        for block in model.transformer["h"]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for tie in (False, True):
        assert plan(sharded(tie)) == plan(NanoGPT(tie))


def test_a_thousand_parameters_are_planned_by_few_looks_at_each_module():
    # A count instead of a clock: plans of large models must not be quadratic in their modules.
    def looks(layers):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(layers)), nn.Linear(8, 4))
        count = 0
        asked = nn.Module.named_modules

        def counting(self, *args, **kwargs):
            nonlocal count
            for item in asked(self, *args, **kwargs):
                count += 1
                yield item

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counting)
            plan(model)
        return count

    assert looks(100) <= 11 * looks(10)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_large_model_on_any_device_has_the_same_plan(device):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**LAYERS, **TOKENS)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    assert plan(model) == plan(transformers.LlamaForCausalLM(config))
