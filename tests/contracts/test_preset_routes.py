"""Where presets send a module's parameters: matrices to their rule, the rest to AdamW unless the rule reads any tensor."""

import pytest
import torch
from torch import nn

import schatten
from schatten import maps


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 16)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(8, 20, bias=False)


def routes(preset, **options):
    return {entry.name: (entry.route, entry.layout) for entry in preset(Model(), **options).plan}


MATRICES = {"inner.weight": ("spectral", "matrix"), "conv.weight": ("spectral", "conv")}

VECTORS = ("inner.bias", "conv.bias", "norm.weight", "norm.bias")

TABLES = ("table.weight", "head.weight")


@pytest.mark.parametrize("name", schatten.presets.__all__)
def test_every_preset_sends_matrices_to_its_rule_and_leaves_nothing_out(name):
    preset = getattr(schatten.presets, name)
    model = Model()
    found = {entry.name: (entry.route, entry.layout) for entry in preset(model).plan}
    assert found.keys() == {n for n, _ in model.named_parameters()}
    assert {n: found[n] for n in MATRICES} == MATRICES
    others = ("spectral", "flat") if preset.others == "spectral" else ("adamw", "-")
    assert all(found[n] == others for n in VECTORS)
    assert all(found[n] == (("spectral", "matrix") if preset is schatten.Scion else others) for n in TABLES)


@pytest.mark.parametrize(
    ("K", "everything"),
    [
        (maps.L1(), True),
        (maps.Frobenius(), True),
        (0.5 * maps.L1() + maps.Frobenius(), True),
        (maps.Huber(0.1, over="entries"), True),
        (maps.L1(over="rows"), False),
    ],
)
def test_lion_k_takes_everything_where_its_map_does(K, everything):
    found = {entry.route for entry in schatten.LionK(Model(), K).plan}
    assert found == ({"spectral"} if everything else {"spectral", "adamw"})


def test_frobenius_normalises_whole_tensors():
    assert schatten.LionK(Model(), maps.Frobenius(), weight_decay=0.0).param_groups[0]["weight_decay"] == 0
    b = nn.Parameter(torch.zeros(2))
    opt = schatten.LionK([b], maps.Frobenius(), lr=1.0, weight_decay=0.0)
    b.grad = torch.tensor([3.0, 4.0])
    opt.step()
    torch.testing.assert_close(b.detach(), torch.tensor([-0.6, -0.8]))


def test_lion_trains_a_whole_model_by_its_sign():
    model = Model()
    opt = schatten.Lion(model, lr=0.25)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.25 * p.grad.sign())


def test_scions_tables_move_by_the_sign_radius_and_its_matrices_by_the_spectral_one():
    model = Model()
    opt = schatten.Scion(model, lr=0.01, radius=2.0, sign_radius=5.0, constrained=False, solver=schatten.solvers.svd())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    moved = {n: (p.detach() - before[n]) for n, p in model.named_parameters()}
    for name in TABLES:
        # Rounded once to weights of size up to 4.
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 0.05 / 8), rtol=0, atol=1e-6)
    # Spectral norm lr rho sqrt(fan_out / fan_in), up to fp32 rounding of weights of size 1.
    assert torch.linalg.matrix_norm(moved["inner.weight"], ord=2).item() == pytest.approx(0.02 * 2**0.5, rel=1e-4)


def test_matrices_lr_and_adamws_are_apart_where_their_units_are():
    opt = schatten.NorMuon(Model())
    assert {group["algorithm"]: group["lr"] for group in opt.param_groups} == {"spectral": 0.02, "adamw": 3e-4}
    opt = schatten.NorMuon(Model(), adamw={"lr": 1e-3, "weight_decay": 0.2})
    adamw = next(group for group in opt.param_groups if group["algorithm"] == "adamw")
    assert (adamw["lr"], adamw["weight_decay"]) == (1e-3, 0.2)
    assert {group["lr"] for group in schatten.Muon(Model(), lr=2e-3).param_groups} == {2e-3}
    assert {group["lr"] for group in schatten.SpectralSGD(Model(), 0.5, normalize="rms").param_groups} == {1e-3}


def test_others_must_be_a_route():
    with pytest.raises(ValueError, match="others must be one of 'spectral', 'adamw', got 'lion'"):
        schatten.plan(Model(), others="lion")
