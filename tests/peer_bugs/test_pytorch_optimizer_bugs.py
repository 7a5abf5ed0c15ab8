"""kozistr/pytorch_optimizer (peers.md 1.8): an inverted scale flag, classes that never step, routing by a leaf's name."""

import pytest
import torch
from torch import nn

import schatten
from schatten import presets
from tests.peer_bugs.helpers import LM, Opt, P, assert_caught, d, decaying, gaussian, route, step, stepped
from tests.peer_bugs.test_keller_bugs import gradients_are_only_read


def scale_multiplies_when_it_is_on(optimizer):
    ratio = d(64, 16, optimizer=optimizer, scale="adamw-rms").norm() / d(64, 16, optimizer=optimizer, scale="none").norm()
    assert abs(ratio - 0.2 * 8) < 0.02


def test_the_scale_multiplies_where_it_is_chosen_and_not_elsewhere():
    scale_multiplies_when_it_is_on(schatten.Muon)


def test_an_inverted_scale_flag_is_caught():
    assert_caught(scale_multiplies_when_it_is_on, "the scale flag is inverted")


def a_zero_gradient_decays_by_lr_times_decay(optimizer):
    for p in (P(8, 8), P(8)):
        opt = decaying(Opt([p], optimizer), 0.1)
        opt.param_groups[0]["lr"] = 0.1  # an AdamW group may have an lr of its own
        w = p.detach().clone()
        step(opt, p, torch.zeros_like(p))
        assert torch.allclose(p, w * 0.99)


# Implicit decay divides by 1 + lr lambda, the trust region's decay is part of the objective, and a fixed norm has none.
OTHER_DECAY = {"LionK", "TrustRegion", "Hyperball"}


@pytest.mark.parametrize("name", [n for n in presets.__all__ if n not in OTHER_DECAY and not getattr(presets, n).needs_closure])
def test_decay_reaches_matrices_and_vectors_of_every_preset(name):
    a_zero_gradient_decays_by_lr_times_decay(getattr(presets, name))


@pytest.mark.parametrize("mistake", ["decay is added to the gradient", "decay is multiplied by the shape factor"])
def test_another_decay_is_caught(mistake):
    assert_caught(a_zero_gradient_decays_by_lr_times_decay, mistake)


def test_maximize_reaches_matrices_and_vectors_of_every_preset(preset):
    for shape in ((8, 6), (6,)):
        ends = []
        for sign, maximize in ((1.0, True), (-1.0, False)):
            p = P(*shape)
            step(Opt([p], preset, lr=0.1, maximize=maximize), p, sign * gaussian(*shape, seed=1))
            ends.append(p.detach())
        assert torch.equal(*ends)


def only_hidden_matrices_are_matrices(routes):
    """`routes(model)` maps names to "spectral" or another route."""
    for tie in (False, True):
        r = routes(LM(100, 16, tie=tie))
        assert r["body.weight"] == "spectral"
        assert "spectral" not in {r["embed.weight"], r["body.bias"], r.get("lm_head.weight")}


def test_heads_embeddings_and_biases_are_no_matrices_tied_or_not():
    only_hidden_matrices_are_matrices(lambda model: route(schatten.plan(model)))


def by_dimensions(model):
    """optax, Scion, HeavyBall: every matrix."""
    return {name: "spectral" if p.ndim == 2 else "adamw" for name, p in model.named_parameters()}


def by_the_leafs_name(model):
    """Excludes what is called embed or lm_head, and looks at the last part of a name, which is "weight"."""
    excluded = ("embed", "lm_head")
    two = {name for name, p in model.named_parameters() if p.ndim == 2 and name.rsplit(".")[-1] not in excluded}
    return {name: "spectral" if name in two else "adamw" for name, _ in model.named_parameters()}


def by_aspect_ratio(model):
    """timm: two dimensions and no side more than a hundred times the other."""
    return {
        name: "spectral" if p.ndim == 2 and max(p.shape) <= 100 * min(p.shape) else "adamw"
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("routes", [by_dimensions, by_the_leafs_name, by_aspect_ratio], ids=lambda f: f.__name__)
def test_routing_by_shapes_or_leaf_names_is_caught(routes):
    with pytest.raises(AssertionError):
        only_hidden_matrices_are_matrices(routes)


# Rules that act on entries or on whole tensors, or have a ball for tables (their docstrings).
BALL_FOR_TABLES, ENTRIES = {"Scion"}, {"Lion", "JaguarMuon"}


@pytest.mark.parametrize("tie", [False, True])
def test_no_preset_orthogonalises_a_table(any_preset, tie):
    model = LM(100, 16, tie=tie)
    opt = any_preset(model)
    tables = {id(model.embed.weight), id(model.lm_head.weight)}
    for group in opt.param_groups:
        if any(id(p) in tables for p in group["params"]):
            name = any_preset.__name__
            if name in BALL_FOR_TABLES:
                assert group["ball"] == "sign"
            elif name in ENTRIES:
                assert group["layout"] == "flat"
            else:
                assert group["algorithm"] == "adamw"


def test_the_plain_parameters_of_a_module_of_matrices_train():
    opt = schatten.Muon(nn.Linear(8, 8, bias=False).parameters())
    assert list(route(opt.plan).values()) == ["spectral"]


def test_those_with_a_bias_are_refused_with_the_way_out_which_works():
    # torch.optim.Muon's contract: of bare tensors it takes matrices only. The module itself says which is which.
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="Pass the model itself, which routes such parameters to AdamW"):
        schatten.Muon(layer.parameters())
    assert route(schatten.Muon(layer).plan) == {"weight": "spectral", "bias": "adamw"}


def test_cautious_decay_of_a_convolution_runs_and_only_reads_gradients():
    assert d(16, 8, 3, 3, decay="cautious").isfinite().all()
    gradients_are_only_read(lambda params, **options: schatten.Muon(params, decay="cautious", weight_decay=0.5, **options))


def test_cautious_decay_compares_with_the_update_that_is_made():
    W, g = gaussian(6, 4), gaussian(6, 4, seed=1)
    U = -step(schatten.Muon([p := nn.Parameter(W.clone())], lr=0.1, weight_decay=0.0), p, g)
    change = step(schatten.Muon([q := nn.Parameter(W.clone())], lr=0.1, weight_decay=0.5, decay="cautious"), q, g)
    assert torch.allclose(change, -U - 0.05 * torch.where(U * W > 0, W, 0.0), atol=1e-6)
    assert not torch.equal(U.sign(), g.sign()), "on this gradient the sign of the update is not the gradient's"


def test_a_routed_module_moves_its_matrix_by_the_rule_of_every_preset(preset):
    # Its convergence test of Muon ran with use_muon=False, so AdamW converged.
    model = nn.Linear(12, 8)
    alone = nn.Parameter(model.weight.detach().clone())
    opt, other = preset(model, lr=0.1), preset([alone], lr=0.1)
    model.weight.grad, model.bias.grad, alone.grad = gaussian(8, 12), torch.ones(8), gaussian(8, 12)
    stepped(opt)
    stepped(other)
    assert torch.equal(model.weight, alone)
    assert opt.plan is not None and route(opt.plan)["weight"] == "spectral"
