"""AdamW's state warms a spectral optimizer: what AdamW still trains goes on, the momentum of matrices is its average."""

import re

import pytest
import torch
from torch import nn

import schatten
from tests.facts.converting import SOLVER, copies, parameters, through_a_file, train


class Net(nn.Module):
    """Matrices of one shape, so that a wrong order of parameters would not be seen by shapes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.double()


def trained(model, named=False, **options):
    params = list(model.parameters())
    adamw = torch.optim.AdamW(list(model.named_parameters()) if named else params, lr=0.02, weight_decay=0.3, **options)
    train(adamw, params, range(4))
    return adamw, params


def twin_of(model):
    twin = Net()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("named", [True, False], ids=["names in the file", "names given"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_each_parameter_gets_its_own_averages_whatever_the_order_of_groups(named, fused, tmp_path):
    model = Net()
    adamw, params = trained(model, named, fused=fused)
    opt = schatten.Muon(twin := twin_of(model), solver=SOLVER)
    names = None if named else [name for name, _ in model.named_parameters()]
    opt.load_state_dict(schatten.converters.from_adamw(through_a_file(adamw.state_dict(), tmp_path), opt, names))
    ours = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        state = opt.state[ours[name]]
        if name in ("first.weight", "second.weight"):
            assert torch.equal(state["momentum_buffer"], adamw.state[p]["exp_avg"])
        else:
            assert all(torch.equal(state[key], adamw.state[p][key].to(state[key])) for key in ("exp_avg", "exp_avg_sq", "step"))
    train(adamw, params, range(4, 8))
    train(opt, list(twin.parameters()), range(4, 8))
    for name, p in model.named_parameters():
        if name not in ("first.weight", "second.weight"):
            # fp64; torch's fused and foreach steps round differently.
            assert torch.allclose(p, ours[name], rtol=0, atol=1e-12), name


def test_the_first_step_of_a_matrix_is_muons_on_adamws_average():
    model = Net()
    adamw, _ = trained(model, named=True)
    opt = schatten.Muon(twin := twin_of(model), solver=SOLVER, nesterov=False, momentum=0.8)
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    W, G = twin.first.weight.detach().clone(), torch.randn(4, 4, dtype=torch.float64)
    twin.first.weight.grad = G
    opt.step()
    M = 0.8 * adamw.state[model.first.weight]["exp_avg"] + 0.2 * G
    U, _, Vh = torch.linalg.svd(M)
    assert torch.allclose(twin.first.weight, W * (1 - 0.02 * 0.3) - 0.02 * 0.2 * 4**0.5 * U @ Vh, rtol=0, atol=1e-12)


def test_lr_and_decay_come_along_where_they_mean_the_same_and_stay_where_not():
    adamw, _ = trained(Net(), named=True)
    numbers = {"adamw-rms": (0.02, 0.3), "keller": (0.5, 0.01)}
    for scale, (lr, decay) in numbers.items():
        opt = schatten.Muon(Net(), lr=0.5, weight_decay=0.01, momentum=0.7, scale=scale)
        opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
        spectral, rest = opt.param_groups
        assert (spectral["lr"], spectral["weight_decay"], spectral["momentum"]) == (lr, decay, 0.7)
        assert (rest["lr"], rest["weight_decay"], rest["betas"]) == (0.02, 0.3, (0.9, 0.999))


def test_a_rule_that_keeps_a_sum_gets_the_sum_of_such_an_average():
    params = parameters([(6, 4)])
    adamw = torch.optim.AdamW(params)
    train(adamw, params, range(4))
    opt = schatten.Muon(own := copies(params), form="sum", momentum=0.9)
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    assert torch.allclose(opt.state[own[0]]["momentum_buffer"] * 0.1, adamw.state[params[0]]["exp_avg"])


def test_spectral_adam_takes_both_averages_and_their_betas():
    params = parameters([(6, 4)])
    adamw = torch.optim.AdamW(params, betas=(0.8, 0.9))
    train(adamw, params, range(4))
    opt = schatten.SpectralAdam(own := copies(params))
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    state, theirs = opt.state[own[0]], adamw.state[params[0]]
    assert all(torch.equal(state[key], theirs[key].to(state[key])) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("layout", ["auto", schatten.Layout(split=(4, 2)), schatten.Layout(heads=2, axis="fan_in")], ids=str)
def test_a_short_average_gets_the_average_in_its_own_form(state_dtype, layout):
    params = parameters([(6, 4)], torch.float32)
    adamw = torch.optim.AdamW(params)
    train(adamw, params, range(4))
    group = {"params": (own := copies(params)), "layout": layout}
    opt = schatten.Muon([{**group, "state_dtype": state_dtype}], solver=SOLVER, momentum=0.95)
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    exact = schatten.Muon([{**group, "params": (twin := copies(params))}], solver=SOLVER, momentum=0.95)
    exact.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), exact))
    for o, p in ((opt, own), (exact, twin)):
        p[0].grad = torch.zeros(6, 4, dtype=torch.float32)
        o.step()
    # Three digits of an average are three digits of its direction; with a momentum that starts from zero nothing moves.
    change = (twin[0] - params[0]).norm()
    assert (own[0] - twin[0]).norm() < 0.1 * change


def test_a_bf16_average_becomes_fp32():
    params = parameters([(6, 4)], torch.bfloat16)
    adamw = torch.optim.AdamW(params)
    train(adamw, params, range(2))
    opt = schatten.Muon(own := copies(params))
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    assert opt.state[own[0]]["momentum_buffer"].dtype == torch.float32


def test_frozen_parameters_of_the_source_are_no_loss_and_trained_ones_are():
    model = Net()
    model.first.requires_grad_(False)
    # Built over all parameters, as scripts do; the frozen ones never had a state.
    adamw = torch.optim.AdamW(model.named_parameters())
    model.embedding(torch.arange(3)).sum().backward()
    adamw.step()
    opt = schatten.Muon(model)
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    model.embedding.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'embedding.weight' is not trained here"):
        schatten.converters.from_adamw(adamw.state_dict(), schatten.Muon(model))


# -- refused ---------------------------------------------------------------------------------------------------------------


def refused(state_dict, opt, names=None):
    before = repr(opt.state_dict())
    with pytest.raises(ValueError) as caught:
        schatten.converters.from_adamw(state_dict, opt, names)
    assert repr(opt.state_dict()) == before
    return str(caught.value)


def test_load_state_dict_refuses_and_offers_the_converter():
    adamw, _ = trained(Net())
    with pytest.raises(ValueError, match=r"schatten\.converters\.from_adamw\(state_dict, opt\)"):
        schatten.Muon(Net()).load_state_dict(adamw.state_dict())


def test_parameters_without_names_are_not_guessed():
    adamw, _ = trained(Net())
    message = refused(adamw.state_dict(), schatten.Muon(Net()))
    assert "groups of 7 parameters, this optimizer of 2, 5" in message and "named_parameters()" in message


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        [f"p{i}" for i in range(7)],
        ["embedding.weight"] * 7,
        [1] * 7,
    ],
    ids=["too few", "others", "twice", "numbers"],
)
def test_names_that_are_not_those_of_the_parameters_are_refused(names):
    adamw, _ = trained(Net())
    assert "names" in refused(adamw.state_dict(), schatten.Muon(Net()), names)


def test_names_in_an_order_that_shapes_contradict_are_refused_by_parameter():
    model = Net()
    adamw, _ = trained(model)
    names = [name for name, _ in model.named_parameters()][::-1]
    message = refused(adamw.state_dict(), schatten.Muon(Net()), names)
    assert re.search(r"'embedding.weight' of shape \(7, 4\): exp_avg has shape \(4,\), not \(7, 4\)", message)


def test_numbers_that_differ_within_one_of_our_groups_are_refused_and_fit_with_a_rule():
    model = Net()
    vectors = {n: p for n, p in model.named_parameters() if p.ndim < 2}
    tables = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    adamw = torch.optim.AdamW([{"params": list(tables.items())}, {"params": list(vectors.items()), "weight_decay": 0.0}])
    train(adamw, list(model.parameters()), range(2))
    message = refused(adamw.state_dict(), schatten.Muon(Net()))
    assert "have weight_decay 0.01 and 0.0" in message and "rules=" in message
    no_decay = {"weight_decay": 0.0}
    opt = schatten.Muon(Net(), rules=[("*.bias", "adamw", no_decay), ("norm.*", "adamw", no_decay)])
    opt.load_state_dict(schatten.converters.from_adamw(adamw.state_dict(), opt))
    assert [group["weight_decay"] for group in opt.param_groups] == [0.01, 0.01, 0.0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad False"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight_decay 0"),
        (lambda p: torch.optim.SGD(p), "no betas, eps"),
        (lambda p: torch.optim.Muon(p), "no betas"),
    ],
    ids=["amsgrad", "Adam with decay", "SGD", "Muon"],
)
def test_what_is_not_adamws_method_is_refused(source, words):
    params = parameters([(6, 4)])
    assert words in refused(source(params).state_dict(), schatten.Muon(copies(params)))


def test_quantised_averages_of_other_names_are_not_taken_for_none():
    # As bitsandbytes' 8-bit AdamW keeps them.
    params = parameters([(6, 4)])
    saved = torch.optim.AdamW(params).state_dict()
    saved["state"] = {0: {"step": 3, "state1": torch.zeros(6, 4, dtype=torch.uint8), "state2": torch.zeros(6, 4)}}
    message = refused(saved, schatten.Muon(copies(params)))
    assert "has no exp_avg, exp_avg_sq, only state1, state2, step" in message


def test_a_rule_without_an_average_of_gradients_is_refused():
    params = parameters([(6, 4)])
    adamw = torch.optim.AdamW(params)
    train(adamw, params, range(1))
    assert "keeps no average of gradients" in refused(adamw.state_dict(), schatten.Dion(copies(params)))


@pytest.mark.parametrize(
    "junk", [None, "x", 3, [], torch.zeros(2), torch.full((6, 4), float("nan"), dtype=torch.float64)], ids=str
)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_damaged_averages_are_refused(key, junk):
    params = parameters([(6, 4)])
    adamw = torch.optim.AdamW(params)
    train(adamw, params, range(1))
    saved = adamw.state_dict()
    saved["state"][0][key] = junk
    if key == "step" and isinstance(junk, int):
        return
    assert key in refused(saved, schatten.SpectralAdam(copies(params)))
