"""Spectral initialisation: every hidden matrix at sqrt(fan_out / fan_in), nothing else touched, no silent exception."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten.initialise import init_spectral_


def model(dtype=None):
    """A Linear that widens, one that narrows, a convolution, and what is no hidden matrix: a table, a norm, biases, a head."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.up = nn.Linear(6, 24)
            self.norm = nn.LayerNorm(24)
            self.down = nn.Linear(24, 6, bias=False)
            self.conv = nn.Conv1d(6, 4, 3)
            self.head = nn.Linear(6, 11)
            self.experts = nn.Parameter(torch.randn(3, 5, 7))

    return Model().to(dtype)


HIDDEN = {"up.weight": (24, 6), "down.weight": (6, 24), "conv.weight": (4, 18)}

BANK = [("experts", "spectral", {"layout": "experts"})]


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def norms(W, shape):
    return torch.linalg.matrix_norm(W.double().reshape(-1, *shape), 2)


# The one rounding of each weight is an error matrix of relative Frobenius norm eps / 2, so of relative spectral norm at most
# sqrt(rank) eps / 2, rank <= 6.
@pytest.mark.parametrize("rules", [(), BANK], ids=["no rules", "bank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_logical_matrix_has_its_norm_and_nothing_else_moved(dtype, rules):
    module = model(dtype)
    before = values(module)
    assert init_spectral_(module, rules) is module
    hidden = {**HIDDEN, **({"experts": (5, 7)} if rules else {})}
    tolerance = 2.5 * torch.finfo(dtype).eps / 2
    for name, W in values(module).items():
        assert W.dtype == dtype
        if name in hidden:
            fan_out, fan_in = hidden[name]
            target = torch.full((len(W) if name == "experts" else 1,), math.sqrt(fan_out / fan_in), dtype=torch.float64)
            torch.testing.assert_close(norms(W, hidden[name]), target, rtol=tolerance, atol=0)
        else:
            assert torch.equal(W, before[name]), name


def test_it_touches_what_the_plan_routes_to_the_spectral_rule():
    module = model()
    before = values(module)
    rules = [("up.weight", "adamw"), ("head.weight", "spectral"), *BANK]
    init_spectral_(module, rules)
    moved = {name for name, W in values(module).items() if not torch.equal(W, before[name])}
    assert moved == {entry.name for entry in schatten.plan(module, rules) if entry.route == "spectral"}
    assert moved == {"down.weight", "conv.weight", "head.weight", "experts"}


def test_a_matrix_is_scaled_by_one_positive_number_and_a_second_call_changes_nothing():
    module = model(torch.float64)
    before = values(module)
    init_spectral_(module, BANK)
    after = values(module)
    for name, shape in {**HIDDEN, "experts": (5, 7)}.items():
        ratios = (after[name] / before[name]).reshape(-1, math.prod(shape))
        torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-14, atol=0)
        assert (ratios > 0).all()
    init_spectral_(module, BANK)
    torch.testing.assert_close(values(module), after, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_old_weights_does_not_matter(scale):
    module, twin = model(), model()
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        twin.up.weight.mul_(scale)
    init_spectral_(module)
    init_spectral_(twin)
    # The multiplication by 1e30 rounds in fp32.
    torch.testing.assert_close(twin.up.weight, module.up.weight, rtol=3e-7, atol=0)


def test_rms_one_goes_to_rms_at_most_one_and_reaches_it():
    module = init_spectral_(model(torch.float64))
    _, _, Vh = torch.linalg.svd(module.up.weight.detach())
    top = Vh[0] * 6**0.5  # of RMS 1
    x = torch.randn(100, 6, dtype=torch.float64)
    x *= 6**0.5 / x.norm(dim=1, keepdim=True)

    def rms(z):
        return (z @ module.up.weight.detach().T).square().mean(-1).sqrt()

    assert rms(top).item() == pytest.approx(1, rel=1e-12)
    assert rms(x).max() <= 1


def test_frozen_and_shared_weights():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    module[2].weight.requires_grad_(False)
    frozen = module[2].weight.clone()
    init_spectral_(module)
    assert norms(module[0].weight.detach(), (4, 4)).item() == pytest.approx(1, rel=1e-6)
    assert module[1].weight is module[0].weight and torch.equal(module[2].weight, frozen)
    assert module[0].weight.is_leaf and module[0].weight.requires_grad


def test_weights_that_are_not_contiguous_are_scaled_in_place():
    layer = nn.Linear(6, 4, bias=False)
    layer.weight = nn.Parameter(torch.randn(6, 4).T)
    init_spectral_(layer)
    assert not layer.weight.is_contiguous()
    assert norms(layer.weight.detach(), (4, 6)).item() == pytest.approx((4 / 6) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: m.up.weight.zero_(), r"'up\.weight' of shape \(24, 6\) is zero"),
        (lambda m: m.conv.weight.zero_(), r"'conv\.weight' of shape \(4, 6, 3\) is zero"),
        (lambda m: m.experts[1].zero_(), r"'experts' of shape \(3, 5, 7\), matrix 1 of 3, is zero"),
        (lambda m: m.up.weight[0, 0].fill_(math.nan), r"'up\.weight' of shape \(24, 6\) holds inf or nan"),
        (lambda m: m.experts[2, 0, 0].fill_(math.inf), r"matrix 2 of 3, holds inf or nan"),
    ],
)
def test_a_matrix_without_a_norm_is_named_and_no_weight_is_changed(break_it, message):
    module = model()
    with torch.no_grad():
        break_it(module)
    before = values(module)
    with pytest.raises(ValueError, match=message + r".*zero what is meant to start at zero after the call"):
        init_spectral_(module, BANK)
    torch.testing.assert_close(values(module), before, rtol=0, atol=0, equal_nan=True)


def test_all_of_them_are_named_at_once():
    module = model()
    with torch.no_grad():
        module.up.weight.zero_()
        module.down.weight.zero_()
    with pytest.raises(ValueError, match=r"'up\.weight'.*'down\.weight'"):
        init_spectral_(module)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        init_spectral_(module)


def test_a_layer_without_entries_is_passed_over():
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    module[1].weight = nn.Parameter(torch.zeros(4, 0))
    init_spectral_(module)
    assert norms(module[0].weight.detach(), (8, 4)).item() == pytest.approx(2**0.5, rel=1e-6)


def test_a_rule_that_matches_nothing_is_refused_as_by_the_plan():
    with pytest.raises(ValueError, match="matches no parameter"):
        init_spectral_(model(), [("nothing", "spectral")])
