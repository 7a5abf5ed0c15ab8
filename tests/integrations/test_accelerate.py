"""accelerate: a prepared optimizer accumulates, clips, saves, resumes, and outlives parameters that replace others."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import schatten

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install 'schatten[hf]'")


def prepared(preset=schatten.Muon):
    """An accelerator, with a model, an optimizer, batches and a scheduler prepared by it: three steps an epoch."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2))
    opt = preset(model, lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6)
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    batches = DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)
    return accelerator, *accelerator.prepare(model, opt, batches, scheduler)


def epoch(accelerator, model, opt, batches, scheduler):
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            scheduler.step()
            opt.zero_grad()


def replace_parameters(model, opt):
    """Other tensors in the place of all parameters, in the model and in the groups, as sharding by accelerate (FSDP2) does."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name, p) for name, p in model.named_parameters()]
    twins = {p: nn.Parameter(p.detach().clone()) for _, _, p in places}
    for module, name, p in places:
        setattr(module, name.rpartition(".")[2], twins[p])
    for group in opt.param_groups:
        group["params"] = [twins[p] for p in group["params"]]


def assert_same_weights(a, b):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "SOAPMuon"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    whole = prepared(getattr(schatten, name))
    epoch(*whole)
    whole[0].save_state(str(tmp_path))
    epoch(*whole)
    rest = prepared(getattr(schatten, name))
    rest[0].load_state(str(tmp_path))
    epoch(*rest)
    assert_same_weights(whole[1], rest[1])
    assert whole[2].param_groups[0]["lr"] == rest[2].param_groups[0]["lr"]


def test_a_step_is_taken_where_gradients_are_complete_and_nowhere_else():
    run = prepared()
    epoch(*run)
    opt = run[2].optimizer
    assert {float(state["step"]) for state in opt.state.values()} == {3.0}
    assert [group["step"] for group in opt.param_groups] == [3, 3]
    # The prepared scheduler has seen three steps, not six micro-batches, on its way from 0.05 to 0 in six.
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "SOAPMuon", "Lion", "EF21Muon"])
def test_parameters_replaced_before_the_first_step_train_as_those_they_replace(name):
    kept, replaced = prepared(getattr(schatten, name)), prepared(getattr(schatten, name))
    replace_parameters(replaced[1], replaced[2])
    epoch(*kept)
    epoch(*replaced)
    assert_same_weights(kept[1], replaced[1])
    opt, twin = kept[2].optimizer, replaced[2].optimizer
    assert twin.metrics() == opt.metrics()
    assert set(twin.state) == set(replaced[1].parameters()), "no state of the parameters that are gone"


@pytest.mark.parametrize("read", ["metrics", "state_dict"])
def test_what_is_read_after_a_replacement_is_of_the_parameters_in_their_place(read):
    kept, replaced = prepared(), prepared()
    replace_parameters(replaced[1], replaced[2])
    assert str(getattr(replaced[2].optimizer, read)()) == str(getattr(kept[2].optimizer, read)())


def test_a_checkpoint_loads_into_parameters_that_have_replaced_others(tmp_path):
    whole = prepared()
    epoch(*whole)
    whole[0].save_state(str(tmp_path))
    epoch(*whole)
    rest = prepared()
    replace_parameters(rest[1], rest[2])
    rest[0].load_state(str(tmp_path))
    epoch(*rest)
    assert_same_weights(whole[1], rest[1])


def test_parameters_replaced_after_a_step_are_refused_by_name_because_their_state_is_lost():
    run = prepared()
    epoch(*run)
    replace_parameters(run[1], run[2])
    before = [p.detach().clone() for p in run[1].parameters()]
    with pytest.raises(RuntimeError, match=r"'0.weight' of shape \(6, 4\).*after 3 steps"):
        epoch(*run)
    assert all(torch.equal(p, q) for p, q in zip(run[1].parameters(), before, strict=True))
