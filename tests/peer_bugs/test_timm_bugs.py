"""timm's Muon (peers.md 1.10): routing by shape, routes kept in state, a default learning rate that is far too hot."""

import pytest
import torch
from torch import nn

import schatten
from schatten import presets
from tests.peer_bugs.helpers import LM, Opt, P, assert_caught, gaussian, raises, route, step, stepped, steps


@pytest.mark.parametrize("tie", [False, True])
def test_an_embedding_of_gpt2_and_a_head_of_a_thousand_classes_are_no_hidden_matrices(tie):
    with torch.device("meta"):
        for vocabulary in (50257, 1000):
            r = route(schatten.plan(LM(vocabulary, 768, tie=tie)))
            assert r["embed.weight"] == "adamw" and r.get("lm_head.weight", "adamw") == "adamw"
            assert r["body.weight"] == "spectral"


def test_a_hidden_matrix_of_that_shape_stays_one():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 1000), nn.ReLU(), nn.Linear(1000, 768), nn.ReLU(), nn.Linear(768, 10))
    assert [route(schatten.plan(model))[f"{i}.weight"] for i in (0, 2)] == ["spectral", "spectral"]


def test_a_route_is_of_the_optimizer_and_a_checkpoint_of_another_is_refused(any_preset):
    def build(algorithm):
        if algorithm == "spectral":
            return any_preset([P(8, 8)])
        return any_preset([{"params": [P(8, 8)], "algorithm": "adamw"}])

    for saved, loaded in (("adamw", "spectral"), ("spectral", "adamw")):
        state = build(saved).state_dict()
        assert raises(ValueError, lambda state=state, loaded=loaded: build(loaded).load_state_dict(state))


def the_default_learning_rate_moves_weights_by_thousandths(optimizer):
    for p in (P(64, 64), P(64)):
        p = nn.Parameter(p.detach() / 8)  # the size nn.Linear starts with
        opt = Opt([p], optimizer)
        assert step(opt, p, gaussian(*p.shape, seed=1)).abs().mean() < 5e-3


# Updates as long as the gradient, by definition, and one estimated from the loss.
NO_SIZE = (schatten.PolarGrad, schatten.SimplifiedMuon, schatten.JaguarMuon)


@pytest.mark.parametrize("name", [n for n in presets.__all__ if getattr(presets, n) not in NO_SIZE])
def test_the_default_learning_rate_is_safe_for_both_halves(name):
    the_default_learning_rate_moves_weights_by_thousandths(getattr(presets, name))


def test_kellers_learning_rate_with_the_scale_of_adamw_is_caught():
    assert_caught(the_default_learning_rate_moves_weights_by_thousandths, "the learning rate of Keller with the scale of AdamW")


def test_training_orthogonalises_matrices_and_counts_the_steps(preset):
    # The Rosenbrock test of "muon" ran its one-dimensional fallback.
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = preset(model)
    spectral = [e.name for e in opt.plan if e.route == "spectral"]
    assert {"0.weight", "2.weight"} <= set(spectral)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p) + 0.1 * gaussian(*p.shape)
        stepped(opt)
    assert opt.state[model[0].weight]["step"] == 2
    assert opt.metrics()["without_gradient"] == []


def test_adams_eps_and_decay_are_its_own_where_they_are_given():
    weight, bias = P(8, 8), P(8)
    groups = [{"params": [weight]}, {"params": [bias], "algorithm": "adamw"}]
    opt = schatten.Muon(groups, weight_decay=0.3, adamw={"weight_decay": 0.0, "eps": 1e-6, "lr": 0.5})
    spectral, adamw = opt.param_groups
    assert (spectral["weight_decay"], adamw["weight_decay"], adamw["eps"], adamw["lr"]) == (0.3, 0.0, 1e-6, 0.5)
    before = bias.detach().clone()
    steps(opt, [weight], 1)
    assert torch.equal(bias, before)
