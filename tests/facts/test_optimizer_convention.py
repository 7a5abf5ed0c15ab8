"""Every preset keeps torch.optim's conventions: what schedulers, trainers and checkpoints expect of any optimizer."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import schatten
from schatten import presets
from tests.contracts.driving import step

MOMENTUM = [n for n in presets.__all__ if {"momentum", "betas"} & set(inspect.signature(getattr(presets, n)).parameters)]


def matrix(seed=0):
    return nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))


def train(opt, params, count=2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        step(opt)
    return [p.detach().clone() for p in params]


def test_it_is_a_torch_optimizer_whose_first_argument_is_params_and_whose_lr_is_called_lr(any_preset):
    parameters = list(inspect.signature(any_preset).parameters)
    assert issubclass(any_preset, torch.optim.Optimizer)
    assert parameters[0] == "params" and "lr" in parameters[:3]
    assert not {"wd", "learning_rate", "beta1"} & set(parameters)


def test_only_params_has_no_default(any_preset):
    # LightningCLI and string-selected trainers call Cls(params) and Cls(params, lr=...).
    options = list(inspect.signature(any_preset).parameters.values())[1:]
    assert all(o.default is not o.empty or o.kind is o.VAR_KEYWORD for o in options)


def test_every_number_is_in_defaults_and_in_every_group(any_preset):
    opt = any_preset([{"params": [matrix()]}, {"params": [matrix(1)]}])
    rule = opt.rule(opt.param_groups[0])
    for key in ("lr", "weight_decay", *rule.hyperparameters):
        assert key in opt.defaults
        assert all(group[key] == opt.defaults[key] for group in opt.param_groups)


def test_a_group_overrides_every_number(any_preset):
    other = {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.25, "betas": (0.25, 0.5), "beta2": 0.25}
    opt = any_preset([matrix()])
    known = {k: v for k, v in other.items() if k in opt.defaults}
    if any_preset is schatten.Hyperball:
        known["weight_decay"] = 0.0  # refused for matrices unless it is 0
    opt.add_param_group({"params": [matrix(1)], **known})
    assert {k: opt.param_groups[1][k] for k in known} == known
    assert all(opt.param_groups[0][k] == opt.defaults[k] for k in known)


@pytest.mark.parametrize("name", MOMENTUM)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: schedulers.OneCycleLR(opt, max_lr=0.1, total_steps=10),
        lambda opt: schedulers.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=3),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_schedulers_that_cycle_momentum_find_it(name, schedule):
    p = matrix()
    opt = getattr(presets, name)([p])
    scheduler, seen = schedule(opt), set()
    for _ in range(4):
        group = opt.param_groups[0]
        seen.add(group["betas"][0] if "betas" in group else group["momentum"])
        train(opt, [p], 1)
        scheduler.step()
    assert len(seen) > 2 and p.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(presets.__all__) - set(MOMENTUM)))
def test_those_without_momentum_take_the_schedule_of_lr_alone(name):
    p = matrix()
    opt = getattr(presets, name)([p])
    scheduler = schedulers.OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=False)
    train(opt, [p], 1)
    scheduler.step()
    assert opt.param_groups[0]["lr"] != opt.defaults["lr"]


def test_initial_lr_is_the_schedulers(any_preset):
    p = matrix()
    opt = any_preset([p], lr=0.1)
    assert "initial_lr" not in opt.param_groups[0]
    scheduler = schedulers.LambdaLR(opt, lambda t: 0.5**t)
    for _ in range(2):
        train(opt, [p], 1)
        scheduler.step()
    assert opt.param_groups[0]["initial_lr"] == 0.1 and opt.param_groups[0]["lr"] == 0.1 * 0.25
    other = any_preset([matrix()])
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["initial_lr"] == 0.1 and other.param_groups[0]["lr"] == 0.1 * 0.25


def test_zero_is_a_value_and_not_unset(any_preset):
    zeros = {"lr": 0.0, "weight_decay": 0.0}
    zeros |= {"momentum": 0.0} if "momentum" in any_preset([matrix()]).defaults else {}
    accepted = set(inspect.signature(any_preset).parameters)
    as_option = any_preset([matrix()], **{k: v for k, v in zeros.items() if k in accepted})
    in_group = any_preset([{"params": [matrix()], **zeros}])
    assert all(as_option.param_groups[0][k] == 0 for k in zeros if k in accepted)
    assert all(in_group.param_groups[0][k] == 0 for k in zeros)
    adamw = any_preset([{"params": [nn.Parameter(torch.ones(3))], "algorithm": "adamw"}], adamw={"lr": 0.0, "eps": 0.0})
    assert adamw.param_groups[0]["lr"] == 0.0 and adamw.param_groups[0]["eps"] == 0.0


def test_at_lr_zero_nothing_moves(any_preset):
    p = matrix()
    before = p.detach().clone()
    assert torch.equal(train(any_preset([p], lr=0.0), [p])[0], before)


def test_step_returns_the_loss_of_its_closure(any_preset):
    p = matrix()
    opt = any_preset([p])

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        if loss.requires_grad:
            loss.backward()
        return loss

    expected = float(p.detach().square().sum())
    # A zero-order preset returns the mean of its two values, eps^2 per entry of the block above.
    assert math.isclose(opt.step(closure).detach().item(), expected, rel_tol=1e-4)


def test_a_tensor_lr_acts_as_the_number_does(any_preset):
    ends = []
    for lr in (0.125, torch.tensor(0.125)):
        p = matrix()
        opt = any_preset([p], lr=lr)
        ends.append(train(opt, [p])[0])
        assert opt.param_groups[0]["lr"] == 0.125
    # 1 - lr lambda is rounded to fp32 once more when lr is a tensor.
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unknown", [{"foreach": True}, {"differentiable": True}, {"learning_rate": 0.1}, {"wd": 0.1}], ids=str)
def test_an_unknown_keyword_is_a_type_error(any_preset, unknown):
    with pytest.raises(TypeError):
        any_preset([matrix()], **unknown)


def test_names_are_kept_in_groups_and_checkpoints(any_preset):
    named = [("blocks.0.weight", matrix()), ("blocks.1.weight", matrix(1))]
    opt = any_preset(named)
    assert opt.param_groups[0]["param_names"] == [name for name, _ in named]
    assert opt.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in named]


def test_a_state_dict_is_numbered_from_zero_and_holds_tensors_and_plain_values(any_preset, tmp_path):
    params = [matrix(), matrix(1)]
    opt = any_preset([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}])
    train(opt, params)
    saved = opt.state_dict()
    assert sorted(saved["state"]) == [0, 1] and [g["params"] for g in saved["param_groups"]] == [[0], [1]]
    assert all(isinstance(v, torch.Tensor) for state in saved["state"].values() for v in state.values())
    torch.save(saved, tmp_path / "state.pt")
    safe = torch.load(tmp_path / "state.pt", weights_only=True)
    assert [g["lr"] for g in safe["param_groups"]] == [g["lr"] for g in opt.param_groups]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_and_hooks_are_torchs_own(any_preset, to_none):
    p = matrix()
    opt, calls = any_preset([p]), []
    p.grad = torch.ones(6, 4)
    opt.zero_grad(set_to_none=to_none)
    assert p.grad is None if to_none else p.grad.count_nonzero() == 0
    opt.register_state_dict_post_hook(lambda opt, state: calls.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda opt, state: calls.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert calls == ["saved", "loaded"]
