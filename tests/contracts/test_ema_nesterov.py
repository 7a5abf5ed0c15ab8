"""EMANesterov as an optimizer: around any other, with schedulers, closures, checkpoints, half precision and bad input."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import schatten
from schatten.ema_nesterov import EMANesterov

INNER = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, foreach=True),
    "Muon": lambda model: schatten.Muon(model, lr=0.02, solver=schatten.solvers.svd()),
}


@pytest.fixture(params=INNER)
def inner(request):
    return INNER[request.param]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def train(model, opt, steps, *steppers):
    """`steps`, a range, of training on batches seeded by the step; the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for t in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t)).to(dtype)
        opt.zero_grad()
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        opt.step()
        for stepper in steppers:
            stepper.step()
        losses.append(loss.item())
    return losses


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def rate(t):
    return min(1.0, (t + 1) / 4, (30 - t) / 20)


# -- as an optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"start": 1000}, {"stop": 0}], ids=["beta 0", "before start", "after stop"])
def test_without_a_shift_it_is_the_inner_optimizer_bit_for_bit(inner, dtype, options):
    plain, wrapped = network(dtype), network(dtype)
    losses = train(plain, inner(plain), range(12))
    assert train(wrapped, EMANesterov(inner(wrapped), **options), range(12)) == losses
    assert all_equal(weights(plain), weights(wrapped))


def test_with_a_shift_it_is_not(inner):
    plain, wrapped = network(), network()
    train(plain, inner(plain), range(3))
    train(wrapped, EMANesterov(inner(wrapped)), range(3))
    assert not any(torch.equal(a, b) for a, b in zip(weights(plain), weights(wrapped), strict=True))


def test_it_trains(inner):
    model = network()
    losses = train(model, EMANesterov(inner(model), decay=0.9), range(60))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_scheduler_gives_it_the_series_it_gives_the_inner_optimizer(inner):
    seen = []
    for wrap in (lambda opt: opt, EMANesterov):
        model = network()
        opt = wrap(inner(model))
        scheduler = schedulers.LambdaLR(opt, rate)
        lrs = []
        for t in range(10):
            lrs.append([group["lr"] for group in opt.param_groups])
            train(model, opt, range(t, t + 1), scheduler)
        seen.append(lrs)
    assert seen[0] == seen[1] and len({lr for step in seen[0] for lr in step}) > 3


def test_a_scheduler_of_the_inner_optimizer_may_come_first(inner):
    results = []
    for scheduler_first in (True, False):
        model = network()
        base = inner(model)
        if scheduler_first:
            scheduler = schedulers.LambdaLR(base, rate)
        opt = EMANesterov(base)
        if not scheduler_first:
            scheduler = schedulers.LambdaLR(opt, rate)
        train(model, opt, range(10), scheduler)
        results.append(weights(model))
    assert all_equal(*results)


def test_a_momentum_cycling_scheduler_finds_the_inner_options(inner):
    model = network()
    opt = EMANesterov(inner(model))
    scheduler = schedulers.OneCycleLR(opt, max_lr=0.05, total_steps=13)
    train(model, opt, range(12), scheduler)
    assert all("max_lr" in group and math.isfinite(group["lr"]) for group in opt.param_groups)


def test_a_closure_sees_the_shifted_weights_and_its_value_is_returned():
    p = nn.Parameter(torch.zeros(3))
    opt = EMANesterov(torch.optim.SGD([p], lr=1.0), beta=0.5, decay=0.0)
    seen = []

    def closure():
        seen.append(p.detach().clone())
        opt.zero_grad()
        loss = -p.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        opt.step(closure)
        loss = opt.step(closure)
    assert torch.equal(seen[1], torch.full((3,), 1.5)) and loss.item() == -4.5


def test_an_optimizer_that_needs_a_closure_gets_it():
    p = nn.Parameter(torch.full((3,), 5.0))
    opt = EMANesterov(torch.optim.LBFGS([p], lr=0.5), beta=0.3, decay=0.5)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    for _ in range(30):
        opt.step(closure)
    assert p.norm() < 1e-2


def test_step_hooks_run_once_around_the_whole_step():
    p = nn.Parameter(torch.zeros(3))
    opt, seen = EMANesterov(torch.optim.SGD([p], lr=1.0), beta=0.5, decay=0.0), []
    opt.register_step_pre_hook(lambda *_: seen.append(p[0].item()))
    opt.register_step_post_hook(lambda *_: seen.append(p[0].item()))
    p.grad = -torch.ones(3)
    opt.step()
    assert seen == [0.0, 1.5]


@pytest.mark.parametrize("through_inner", [True, False])
def test_a_group_added_later_begins_its_path_there(through_inner):
    p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = EMANesterov(torch.optim.SGD([p], lr=1.0), beta=0.5, decay=0.0)
    p.grad = -torch.ones(2)
    opt.step()
    (opt.optimizer if through_inner else opt).add_param_group({"params": [q], "lr": 10.0})
    p.grad = q.grad = -torch.ones(2)
    opt.step()
    # Inner step 10, shift half of it, with its own lr as lr_max.
    assert torch.equal(q.detach(), torch.full((2,), 15.0))


def test_a_parameter_that_never_got_a_gradient_does_not_move(inner):
    model = network()
    model[2].requires_grad_(False)
    before = weights(model[2])
    train(model, EMANesterov(torch.optim.AdamW(model.parameters(), lr=0.1)), range(5))
    assert all_equal(weights(model[2]), before)


def test_weights_loaded_after_construction_are_no_displacement(inner):
    model, twin = network(), network()
    opt = EMANesterov(inner(model))
    for m in (model, twin):
        m.load_state_dict({key: value + 3 for key, value in m.state_dict().items()})
    train(model, opt, range(5))
    train(twin, EMANesterov(inner(twin)), range(5))
    assert all_equal(weights(model), weights(twin))


def test_a_gradient_scaler_skips_the_step_and_the_shift_together():
    p = nn.Parameter(torch.zeros(2))
    opt = EMANesterov(torch.optim.SGD([p], lr=1.0), beta=0.5, decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf):
        opt.zero_grad()
        scaler.scale(-factor * p.sum()).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(p.detach(), torch.full((2,), 1.5)) and opt.steps == 1


# -- lr_max ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("keys", "relative"),
    [({}, 0.5), ({"initial_lr": 4.0}, 0.25), ({"initial_lr": 0.5, "max_lr": 10.0}, 0.1), ({"initial_lr": 0.5}, 1.0)],
    ids=["construction", "initial_lr", "max_lr", "above its maximum"],
)
def test_the_shift_is_scaled_by_lr_over_its_maximum(keys, relative, tensor):
    def number(x):
        return torch.tensor([x]) if tensor else x

    p = nn.Parameter(torch.zeros(2))
    opt = EMANesterov(torch.optim.SGD([p], lr=number(2.0)), beta=0.5, decay=0.0)
    opt.param_groups[0].update({key: number(value) for key, value in keys.items()})
    if tensor:
        opt.param_groups[0]["lr"].fill_(1.0)  # as a scheduler moves it
    else:
        opt.param_groups[0]["lr"] = 1.0
    p.grad = -torch.ones(2)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 + 0.5 * relative))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_an_lr_of_zero_shifts_nothing(lr):
    p = nn.Parameter(torch.ones(2))
    opt = EMANesterov(torch.optim.SGD([p], lr=lr), decay=0.0)
    for _ in range(3):
        p.grad = torch.ones(2)
        opt.step()
    assert torch.equal(p.detach(), torch.ones(2))


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_run_resumes_exactly_with_its_schedule(inner, dtype, at):
    def build():
        model = network(dtype)
        opt = EMANesterov(inner(model), decay=0.9)
        return model, opt, schedulers.LambdaLR(opt, rate)

    model, opt, scheduler = first = build()
    train(model, opt, range(at), scheduler)
    states = through_a_file([thing.state_dict() for thing in first])
    with opt.unshifted():
        evaluated = weights(model)
    expected = train(model, opt, range(at, 15), scheduler)
    others = build()
    for thing, state in zip(others, states, strict=True):
        thing.load_state_dict(state)
    with others[1].unshifted():
        assert all_equal(weights(others[0]), evaluated)
    assert train(others[0], others[1], range(at, 15), others[2]) == expected
    assert all_equal(weights(model), weights(others[0]))


def test_a_loaded_checkpoint_shares_no_memory_with_the_optimizer(inner):
    model = network()
    opt = EMANesterov(inner(model))
    train(model, opt, range(3))
    state = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(state["ema_nesterov"])
    opt.load_state_dict(state)
    train(model, opt, range(3, 6))
    paths = zip(state["ema_nesterov"]["paths"], kept["paths"], strict=True)
    assert all(torch.equal(now[key], then[key]) for now, then in paths for key in then)


def test_the_state_is_the_inner_optimizer_s_and_stays_so_after_loading(inner):
    model = network()
    opt = EMANesterov(inner(model))
    train(model, opt, range(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.state is opt.optimizer.state and opt.param_groups is opt.optimizer.param_groups
    without = {key: value for key, value in opt.state_dict().items() if key != "ema_nesterov"}
    assert set(without) == set(opt.optimizer.state_dict()) >= {"state", "param_groups"}


def test_checkpoints_of_others_are_refused_and_change_nothing():
    model = network()
    opt = EMANesterov(INNER["AdamW"](model))
    train(model, opt, range(3))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"no key 'ema_nesterov'.*\.optimizer\.load_state_dict"):
        opt.load_state_dict(opt.optimizer.state_dict())
    other = copy.deepcopy(before)
    other["ema_nesterov"]["paths"].pop()
    with pytest.raises(ValueError, match="do not fit these parameters"):
        opt.load_state_dict(other)
    other = copy.deepcopy(before)
    other["param_groups"] = []
    with pytest.raises(ValueError):
        opt.load_state_dict(other)
    after = opt.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_copies_and_pickles_go_on_bit_for_bit(inner):
    model = network()
    opt = EMANesterov(inner(model), decay=0.9)
    train(model, opt, range(3))
    copied = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    expected = train(model, opt, range(3, 8))
    for other_model, other in copied:
        assert train(other_model, other, range(3, 8)) == expected
        assert all_equal(weights(other_model), weights(model))


# -- evaluation -----------------------------------------------------------------------------------------------------------


def test_unshifted_gives_the_weights_the_inner_step_left_and_then_the_shifted_ones_again(inner, dtype):
    model = network(dtype)
    opt, left = EMANesterov(inner(model), decay=0.5), []
    opt.optimizer.register_step_post_hook(lambda *_: left.append(weights(model)))
    train(model, opt, range(5))
    ahead = weights(model)
    with opt.unshifted():
        assert all_equal(weights(model), left[-1])
        with opt.unshifted():
            assert all_equal(weights(model), left[-1])
        assert all_equal(weights(model), left[-1])
    assert all_equal(weights(model), ahead) and not all_equal(ahead, left[-1])
    with pytest.raises(ZeroDivisionError), opt.unshifted():
        _ = 1 / 0
    assert all_equal(weights(model), ahead)


def test_unshifted_does_nothing_where_nothing_was_shifted():
    model = network()
    opt = EMANesterov(INNER["SGD"](model), stop=3)
    train(model, opt, range(5))
    with torch.no_grad():
        model[0].weight.mul_(2)  # as a clip after the step would
    changed = weights(model)
    with opt.unshifted():
        assert all_equal(weights(model), changed)


def test_a_step_within_unshifted_is_refused():
    model = network()
    opt = EMANesterov(INNER["SGD"](model))
    train(model, opt, range(3))
    before = weights(model)
    with opt.unshifted():
        with opt.unshifted():
            pass
        with pytest.raises(RuntimeError, match="inside unshifted"):
            opt.step()
    assert all_equal(weights(model), before)
    train(model, opt, range(3, 4))


# -- precision and failure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_paths_in_fp32(dtype):
    opt = EMANesterov(torch.optim.SGD([nn.Parameter(torch.ones(4, dtype=dtype))], lr=0.1))
    for path in opt.state_dict()["ema_nesterov"]["paths"]:
        assert {value.dtype for value in path.values()} == {torch.float32}


def test_a_shift_far_below_what_bf16_resolves_is_right_in_the_mean():
    n = 20_000
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    opt = EMANesterov(torch.optim.SGD([p], lr=1.0), beta=0.5, decay=0.9)
    p.grad = torch.full_like(p, -(2**-7))  # one unit in the last place of 1
    opt.step()
    with opt.unshifted():
        assert torch.equal(p.detach(), torch.full_like(p, 1 + 2**-7))
    shift = p.detach().double().mean() - (1 + 2**-7)
    # The shift is 0.05 units: an entry takes the whole unit with probability 0.05, deviation 0.22 of it. Five of the mean's.
    assert shift / 2**-7 == pytest.approx(0.05, abs=5 * 0.22 / n**0.5)


def test_the_noise_of_the_shift_differs_between_steps_and_parameters():
    params = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
    opt, seen = EMANesterov(torch.optim.SGD(params, lr=1.0), beta=0.5, decay=0.0), []
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, -(2**-7))
        opt.step()
        with opt.unshifted():
            left = weights(nn.ParameterList(params))
        seen += [(p.detach() != w) for p, w in zip(params, left, strict=True)]
    assert all(100 < mask.sum() < 900 for mask in seen)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_are_not_hidden(bad):
    p = nn.Parameter(torch.ones(3))
    opt = EMANesterov(torch.optim.SGD([p], lr=1.0))
    for gradient in (torch.ones(3), torch.tensor([1.0, bad, 1.0]), torch.ones(3)):
        p.grad = gradient
        opt.step()
    assert p.isfinite().tolist() == [True, False, True]
    with opt.unshifted():
        assert p.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.0}, r"beta must lie in \[0, 1\)"),
        ({"beta": -0.1}, r"beta must lie in \[0, 1\)"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"decay": math.nan}, r"decay must lie in \[0, 1\)"),
        ({"start": -1}, "start must be a step"),
        ({"start": 0.5}, "start must be a step"),
        ({"stop": -1}, "stop must be a step"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EMANesterov(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), **options)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"wraps a torch\.optim\.Optimizer, got list"):
        EMANesterov([nn.Parameter(torch.ones(2))])
