"""Groups: every form in which parameters may come, and every option as a default, per group and seen in the step."""

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers
from tests.contracts.driving import step

EXACT = solvers.svd()

# Each option with a value that differs from the default, and with what makes the difference visible.
OVERRIDES = {
    "lr": 0.05,
    "weight_decay": 0.5,
    "momentum": 0.5,
    "nesterov": False,
    "scale": "keller",
    "solver": solvers.newton_schulz(),
    "form": "sum",
    "decay": "implicit",
    "maximize": True,
}


def matrix(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*(shape or (6, 4))).to(dtype))


def train(opt, params, steps=3, seed=1):
    """`steps` steps on seeded gradients, the same for every optimizer of the same shapes; the weights after."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        step(opt)
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize(
    "as_given",
    [
        lambda named: [p for _, p in named],
        lambda named: tuple(p for _, p in named),
        lambda named: (p for _, p in named),
        lambda named: list(named),
        lambda named: iter(named),
        lambda named: [{"params": [p for _, p in named]}],
        lambda named: [{"params": (p for _, p in named)}],
        lambda named: [{"params": list(named)}],
        lambda named: [{"params": p} for _, p in named],
        lambda named: ({"params": [pair]} for pair in named),
    ],
    ids=[
        "list",
        "tuple",
        "generator",
        "pairs",
        "pairs generator",
        "group",
        "group of a generator",
        "group of pairs",
        "groups of one tensor",
        "generator of groups",
    ],
)
def test_every_form_of_parameters_trains_the_same(any_preset, as_given):
    start = [torch.randn(6, 4), torch.randn(3, 5)]
    results = []
    for form in (lambda named: [p for _, p in named], as_given):
        params = [nn.Parameter(w.clone()) for w in start]
        opt = any_preset(form([("first", params[0]), ("second", params[1])]), lr=0.1)
        results.append(train(opt, params))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_names_are_kept_and_appear_in_groups_plan_and_metrics():
    opt = schatten.Muon([("a.weight", matrix()), ("b.weight", matrix())])
    assert opt.param_groups[0]["param_names"] == ["a.weight", "b.weight"]
    assert [entry.name for entry in opt.plan] == ["a.weight", "b.weight"]
    assert opt.metrics()["without_gradient"] == ["a.weight", "b.weight"]


def test_every_hyperparameter_is_in_defaults_and_in_every_spectral_group():
    opt = schatten.Muon([{"params": [matrix()]}, {"params": [matrix()], "lr": 0.2}], **OVERRIDES, rounding="nearest")
    expected = {**OVERRIDES, "rounding": "nearest"}
    assert {k: opt.defaults[k] for k in expected} == expected
    assert {k: opt.param_groups[0][k] for k in expected} == expected
    assert {k: opt.param_groups[1][k] for k in expected} == {**expected, "lr": 0.2}


def test_an_adamw_group_has_adamw_options_and_no_spectral_ones():
    opt = schatten.Muon(
        [{"params": [matrix(5)], "algorithm": "adamw"}], lr=0.2, weight_decay=0.3, adamw={"betas": (0.8, 0.9), "eps": 1e-6}
    )
    (group,) = opt.param_groups
    assert {k: group[k] for k in ("lr", "weight_decay", "betas", "eps")} == {
        "lr": 0.2,
        "weight_decay": 0.3,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
    }
    assert not {"momentum", "nesterov", "scale", "solver", "form", "decay", "layout", "adamw"} & set(group)


def train_on_one_schedule(opt, params, steps=3):
    """The same gradients for every parameter, while momentum halves each step (at constant momentum "sum" acts as "ema")."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        g = torch.randn(params[0].shape, generator=generator)
        for p in params:
            p.grad = g.to(p.dtype)
        opt.step()
        for group in opt.param_groups:
            group["momentum"] /= 2
    return [p.detach() for p in params]


@pytest.mark.parametrize("option", OVERRIDES)
def test_an_option_of_a_group_acts_there_as_the_constructors_would_and_nowhere_else(option):
    start, base, value = torch.randn(6, 4), {"lr": 0.1, "solver": EXACT}, {option: OVERRIDES[option]}

    def alone(**options):
        p = nn.Parameter(start.clone())
        return train_on_one_schedule(schatten.Muon([p], **options), [p])[0]

    first, second = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    opt = schatten.Muon([{"params": [first]}, {"params": [second], **value}], **base)
    untouched, overridden = train_on_one_schedule(opt, [first, second])
    assert torch.equal(untouched, alone(**base))
    assert torch.equal(overridden, alone(**{**base, **value}))
    # The smallest effect here is that of the decay's form: (lr wd)^2 |W| and lr^2 wd |U|, about 1e-3 per step.
    assert (overridden - untouched).norm() > 1e-3


def test_rounding_can_differ_between_groups():
    params = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    opt = schatten.Muon([{"params": [params[0]], "rounding": "nearest"}, {"params": [params[1]]}], lr=1e-4)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        opt.step()
    # Decay takes 1e-5 of a weight at a step, 1/390 of the distance to the next bf16 number below 1.
    assert torch.equal(params[0], torch.ones_like(params[0]))
    # 20 steps of 4096 weights move about 20 * 4096 / 390 = 210 of them; none has probability e^-210.
    assert (params[1] < 1).any()


def test_an_existing_groups_dict_makes_a_new_group_with_its_options():
    opt = schatten.Muon([matrix()], lr=0.3, nesterov=False, scale="keller", solver=EXACT, decay="implicit")
    opt.add_param_group({**opt.param_groups[0], "params": [matrix(3, 5)], "lr": 0.7})
    first, second = opt.param_groups
    assert {**first, "params": 0, "lr": 0} == {**second, "params": 0, "lr": 0}
    again = schatten.Muon([{**first, "params": [matrix()], "nesterov": True}])
    assert again.param_groups[0]["nesterov"] and again.param_groups[0]["scale"] == "keller"


def test_a_named_groups_dict_with_other_parameters_is_refused_in_words_not_by_an_index():
    (group,) = schatten.Muon([("a", matrix())]).param_groups
    with pytest.raises(ValueError, match="param_names"):
        schatten.Muon([{**group, "params": [matrix(), matrix()]}])


def test_an_added_group_gets_state_at_once_and_trains():
    first, second, bias = matrix(), matrix(3, 5), matrix(5)
    opt = schatten.Muon([first], lr=0.1)
    opt.add_param_group({"params": second, "lr": 0.2})
    opt.add_param_group({"params": [bias], "algorithm": "adamw"})
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.2, 0.1]
    assert set(opt.state) == {first, second, bias}
    before = [p.detach().clone() for p in (first, second, bias)]
    after = train(opt, [first, second, bias], steps=1)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    p, good, bad = matrix(), matrix(3, 5), matrix(5)
    opt = schatten.Muon([p])
    with pytest.raises(ValueError):
        opt.add_param_group({"params": [good, bad]})
    assert len(opt.param_groups) == 1 and set(opt.state) == {p}
    opt.add_param_group({"params": [good]})
    assert set(opt.state) == {p, good}


def test_a_module_gives_the_same_lr_and_decay_to_both_algorithms_and_trains_all_of_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = schatten.Muon(model, lr=0.02, weight_decay=0.3, adamw={"betas": (0.8, 0.99)})
    assert [group["algorithm"] for group in opt.param_groups] == ["spectral", "adamw"]
    assert [(group["lr"], group["weight_decay"]) for group in opt.param_groups] == [(0.02, 0.3)] * 2
    assert opt.param_groups[1]["betas"] == (0.8, 0.99)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(16, 4)).square().mean().backward()
    opt.step()
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_the_bare_engine_has_muons_rule_and_asks_for_its_momentum():
    opt = schatten.SpectralOptimizer([matrix()], momentum=0.9)
    assert opt.rule(opt.param_groups[0]) == schatten.Rule()
    with pytest.raises(ValueError, match="needs a value for 'momentum'"):
        schatten.SpectralOptimizer([matrix()])


def test_a_group_may_be_empty():
    # As torch allows, for a group that fills later or a model part without such parameters.
    W = nn.Parameter(torch.zeros(3, 3))
    opt = schatten.Muon([{"params": []}, {"params": [W]}])
    W.grad = torch.ones(3, 3)
    opt.step()
    assert float(W.detach().abs().max()) > 0
