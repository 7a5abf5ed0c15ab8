"""Refusals: each at construction (or before the first weight changes), in words that name what was given and the way out."""

import pytest
import torch
from torch import nn

import schatten

P = nn.Parameter


def matrix(*shape, dtype=torch.float32):
    return P(torch.randn(*(shape or (6, 4))).to(dtype))


SHARED = matrix()

# Per case: the parameters, the error and its words.
PARAMETERS = {
    "a vector": (lambda: [matrix(5)], ValueError, r"needs matrices, but params\[0\] has shape \(5,\).*algorithm='adamw'"),
    "a scalar": (lambda: [P(torch.tensor(1.0))], ValueError, r"needs matrices, but params\[0\] has shape \(\)"),
    "a named vector": (lambda: [("norm.weight", matrix(5))], ValueError, r"'norm.weight' has shape \(5,\)"),
    "three dimensions": (
        lambda: [matrix(), matrix(2, 3, 4)],
        ValueError,
        r"params\[1\] of shape \(2, 3, 4\) may be a 1-D convolution or a bank.*layout='conv' or layout='experts'",
    ),
    "complex": (
        lambda: [P(torch.randn(3, 4, dtype=torch.complex64))],
        ValueError,
        r"params\[0\] of shape \(3, 4\) is complex.*view_as_real",
    ),
    "integer": (
        lambda: [P(torch.ones(3, 4, dtype=torch.int64), requires_grad=False)],
        ValueError,
        r"floating point, but params\[0\] of shape \(3, 4\) is torch.int64",
    ),
    "sparse": (
        lambda: [P(torch.randn(3, 4).to_sparse())],
        ValueError,
        r"dense, but params\[0\] of shape \(3, 4\) is torch.sparse_coo: call .to_dense\(\)",
    ),
    "twice in a group": (
        lambda: [SHARED, matrix(), SHARED],
        ValueError,
        r"appear once, but params\[2\] and params\[0\] are the same tensor of shape \(6, 4\)",
    ),
    "a set": (lambda: {matrix(), matrix()}, TypeError, r"fixed order, got a set: pass a list"),
    "names for some": (
        lambda: [("a", matrix()), matrix()],
        ValueError,
        r"names to all parameters of a group or to none: 1 of 2 have one",
    ),
    "no tensor": (lambda: [matrix(), "weight"], TypeError, r"tensors or \(name, tensor\) pairs, got str"),
    "no leaf": (lambda: [matrix() * 2], ValueError, r"is no leaf"),
}

SHAPED = ("a vector", "a scalar", "a named vector", "three dimensions")

OPTIONS = {
    "negative lr": ({"lr": -1e-3}, r"lr must be finite and >= 0, got -0.001"),
    "nan lr": ({"lr": float("nan")}, r"lr must be finite and >= 0, got nan"),
    "infinite lr": ({"lr": float("inf")}, r"lr must be finite and >= 0, got inf"),
    "negative tensor lr": ({"lr": torch.tensor(-1.0)}, r"lr must be finite and >= 0, got -1"),
    "lr of two elements": ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element, got shape \(2,\)"),
    "negative decay": ({"weight_decay": -0.1}, r"weight_decay must be finite and >= 0, got -0.1"),
    "nan decay": ({"weight_decay": float("nan")}, r"weight_decay must be finite and >= 0, got nan"),
    "momentum 1": ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
    "negative momentum": ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
    "nan momentum": ({"momentum": float("nan")}, r"momentum must lie in \[0, 1\), got nan"),
    "unknown scale": ({"scale": "sqrt"}, r"scale must be one of 'adamw-rms', 'keller', 'mup', 'none', got 'sqrt'"),
    "ambiguous scale": ({"scale": "spectral"}, r"'spectral' is .*'adamw-rms' .*'mup'"),
    "unknown decay": ({"decay": "l2"}, r"decay must be 'explicit', 'implicit', 'cautious' or a retraction .* got 'l2'"),
    "unknown form": ({"form": "nesterov"}, r"form must be 'ema' .* or 'sum', got 'nesterov'"),
    "unknown rounding": ({"rounding": "up"}, r"rounding must be one of 'stochastic', 'kahan', 'nearest', got 'up'"),
}

ADAMW_OPTIONS = {
    "beta 1": ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    "one beta": ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    "negative eps": ({"eps": -1e-8}, r"eps must be finite and >= 0, got -1e-08"),
}


def added_later(group):
    """The group, added to an optimizer that has one; a refusal must leave that as it was."""
    opt = schatten.Muon([first := matrix()])
    try:
        opt.add_param_group(group)
    finally:
        assert len(opt.param_groups) == 1 and set(opt.state) == {first}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_that_no_rule_can_train_are_refused_by_constructor_and_add_param_group_alike(any_preset, case):
    params, error, words = PARAMETERS[case]
    if case in SHAPED and any_preset is schatten.Lion:
        any_preset(params())  # its rule reads any tensor
        return
    for construct in (any_preset, lambda given: any_preset([{"params": given}]), lambda given: added_later({"params": given})):
        with pytest.raises(error, match=words):
            construct(params())


@pytest.mark.parametrize("case", OPTIONS)
def test_options_out_of_range_are_refused_as_default_in_a_group_and_in_an_added_group(case):
    option, words = OPTIONS[case]
    for construct in (
        lambda: schatten.Muon([matrix()], **option),
        lambda: schatten.Muon([{"params": [matrix()], **option}]),
        lambda: added_later({"params": [matrix()], **option}),
    ):
        with pytest.raises(ValueError, match=words):
            construct()


@pytest.mark.parametrize("case", ADAMW_OPTIONS)
def test_adamw_options_out_of_range_are_refused_even_before_there_is_an_adamw_group(case):
    option, words = ADAMW_OPTIONS[case]
    group = {"params": [matrix(5)], "algorithm": "adamw", **option}
    for construct in (
        lambda: schatten.Muon([group]),
        lambda: added_later(group),
        lambda: schatten.Muon(nn.Linear(8, 6), adamw=option),
        lambda: schatten.Muon([matrix()], adamw=option),
    ):
        with pytest.raises(ValueError, match=words):
            construct()


@pytest.mark.parametrize("solver", ["svd", schatten.solvers.svd, 3])
def test_a_solver_that_is_none_is_refused_at_construction_not_in_the_first_step(solver):
    with pytest.raises(TypeError, match="solver"):
        schatten.Muon([matrix()], solver=solver)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"algorithm": "sgd"}, r"algorithm must be one of 'spectral', 'adamw', got 'sgd'"),
        (
            {"layout": "linear"},
            r"layout must be one of 'auto', 'matrix', 'conv', 'positions', 'experts', 'flat' or a Layout, got 'linear'",
        ),
    ],
)
def test_unknown_group_options_are_refused(group, words):
    with pytest.raises(ValueError, match=words):
        schatten.Muon([{"params": [matrix()], **group}])


def test_layout_matrix_is_refused_for_a_convolution():
    with pytest.raises(ValueError, match=r"two dimensions, but params\[0\] has shape \(4, 3, 2, 2\); try 'conv' or 'experts'"):
        schatten.Muon([{"params": [matrix(4, 3, 2, 2)], "layout": "matrix"}])


def test_a_parameter_in_two_groups_is_refused_by_both_its_names():
    p = matrix()
    with pytest.raises(ValueError, match=r"'second' is 'first' of another group"):
        schatten.Muon([{"params": [("first", p)]}, {"params": [("second", p)]}])
    with pytest.raises(ValueError, match=r"params\[1\] is params\[0\] of another group"):
        schatten.Muon([p]).add_param_group({"params": [matrix(), p]})


def test_groups_with_and_without_names_do_not_mix():
    with pytest.raises(ValueError, match="with/without names"):
        schatten.Muon([{"params": [("a", matrix())]}, {"params": [matrix()]}])


@pytest.mark.parametrize("empty", [[], (), iter(())], ids=["list", "tuple", "generator"])
def test_an_empty_parameter_list_is_refused(preset, empty):
    with pytest.raises(ValueError, match="empty parameter list"):
        preset(empty)


def test_a_lone_tensor_is_refused(preset):
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        preset(matrix())


def test_a_group_that_is_no_dict_is_refused():
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        schatten.Muon([matrix()]).add_param_group([matrix()])


def test_rules_without_a_module_are_refused():
    with pytest.raises(ValueError, match="pass the module itself instead of its parameters"):
        schatten.Muon([matrix()], rules=[("*", "spectral")])


@pytest.mark.parametrize("where", ["spectral", "adamw"])
def test_a_sparse_gradient_is_refused_by_name_before_any_weight_or_state_changes(where):
    named = [("first", matrix()), ("table", matrix(5, 3))]
    first, table = (p for _, p in named)
    opt = schatten.Muon([{"params": named[:1]}, {"params": named[1:], "algorithm": where}], lr=0.1)
    first.grad, table.grad = torch.randn(6, 4), torch.randn(5, 3).to_sparse()
    before = [p.detach().clone() for p in (first, table)]
    with pytest.raises(RuntimeError, match=r"dense, but that of 'table', shape \(5, 3\), is torch.sparse_coo.*No weight"):
        opt.step()
    assert all(torch.equal(p, w) for p, w in zip((first, table), before, strict=True))
    assert all(value.count_nonzero() == 0 for p in (first, table) for value in opt.state[p].values())
    assert all(group["step"] == 0 for group in opt.param_groups)


@pytest.mark.parametrize(
    ("preset", "option"),
    [(schatten.NorMuon, {"scale": "mup"}), (schatten.Dion, {"rank": 0.5}), (schatten.SpectralAdam, {"eps": 1e-6})],
)
def test_an_option_that_a_group_cannot_change_is_refused_there_instead_of_ignored(preset, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} is one for all groups of {preset.__name__}"):
        preset([{"params": [matrix()], **option}])
    rule = schatten.Rule(scale=schatten.scales.Scale("none"))
    opt = preset([{"params": [matrix()], "rule": rule, "momentum": 0.5}])
    assert opt.rule(opt.param_groups[0]) == rule


@pytest.mark.parametrize(
    ("wrong", "right"), [("weight_dacay", "weight_decay"), ("momentun", "momentum"), ("roundings", "rounding")]
)
def test_a_misspelt_group_option_is_refused_and_a_callers_own_is_kept(wrong, right):
    with pytest.raises(ValueError, match=f"{wrong}.* did you mean '{right}'"):
        schatten.Muon([{"params": [matrix()], wrong: 0.5}])
    opt = schatten.Muon([{"params": [matrix()], "lr_scale": 0.5, "name": "head", "max_momentum": 0.9}])
    assert opt.param_groups[0]["lr_scale"] == 0.5
