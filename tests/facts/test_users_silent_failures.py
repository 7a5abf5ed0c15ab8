"""What went wrong elsewhere while the loss still fell, by the rows of reference/users.md section 3 that one process can show.

Rows 2, 7, 8, 9, 11 and 14 need sharding, offload or tied replicas, row 10 is the routing rules'; they are tested there.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from schatten import Muon
from schatten.scales import Scale
from schatten.solvers import polynomial
from tests.contracts.matrices import gaussian

CONVOLUTIONS = [(32, 8, 3, 3), (8, 16, 1, 1), (16, 4, 5, 3), (8, 24, 1, 7)]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [(24, 64), (64, 64), (64, 16)]
    return nn.Sequential(*(nn.Linear(fan_in, fan_out) for fan_in, fan_out in sizes)).to(dtype)


def filled(params, seed=1, scale=1.0):
    for i, p in enumerate(params):
        p.grad = (scale * gaussian(*p.shape, seed=seed + i)).to(p.dtype)


def changes(params, opt):
    before = [p.detach().clone() for p in params]
    opt.step()
    return [(p.detach() - W).double() for p, W in zip(params, before, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_1_every_matrix_is_orthogonalised(dtype):
    # DeepSpeed 8441: no orthogonalisation at all by default, so Muon was SGD with momentum.
    model = network(dtype)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    opt = Muon(model, lr=1.0, weight_decay=0.0, scale="none", rounding="nearest")
    filled(model.parameters(), scale=1e-3)
    for change in changes(matrices, opt):
        sigma = torch.linalg.svdvals(change)
        # The default solver's band is [0.84, 1.16]; weights of size 1 in bf16 add 0.4 % of rounding.
        assert sigma.min() > 0.7 and sigma.max() < 1.3
    assert opt.metrics()["without_gradient"] == []


@pytest.mark.parametrize("width", [16, 64, 256])
def test_row_3_clipping_does_not_shorten_the_step(width):
    # DeepSpeed 8439: the clip was applied to the update, whose norm is sqrt(width), so wide layers took short steps.
    W = nn.Parameter(torch.zeros(width, width))
    opt = Muon([W], lr=0.1, weight_decay=0.0)
    filled([W], scale=100.0)
    nn.utils.clip_grad_norm_([W], 1.0)
    (change,) = changes([W], opt)
    effective = opt.metrics()["effective_lr"]["0.0"]
    assert effective == pytest.approx(0.1 * 0.2 * math.sqrt(width), rel=1e-6)
    # A gradient's polar factor: Frobenius norm sqrt(width) within the default solver's band.
    assert 0.84 < change.norm() / (effective * math.sqrt(width)) < 1.16


def test_row_4_four_micro_batches_are_the_large_batch():
    # DeepSpeed PR 8600: one orthogonalisation per micro-batch, 0.13 away from the large batch.
    X, Y = gaussian(128, 16).float(), gaussian(128, 48, seed=1).float()

    def wide():
        # Gradients of full rank: directions that the data leave at zero would be rounding noise, orthogonalised.
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 48))

    def trained(micro_batches):
        model = wide()
        opt = Muon(model, lr=0.01, solver=polynomial(dtype="float32"))
        for _ in range(5):
            for x, y in zip(X.chunk(micro_batches), Y.chunk(micro_batches), strict=True):
                ((model(x) - y).square().mean() / micro_batches).backward()
            opt.step()
            opt.zero_grad()
        return [p.detach() for p in model.parameters()]

    for a, b, start in zip(trained(4), trained(1), wide().parameters(), strict=True):
        # fp32 sums in another order.
        assert (a - b).norm() < 1e-3 * (b - start.detach()).norm()


def test_row_5_the_caller_s_groups_keep_their_numbers_through_a_checkpoint():
    # DeepSpeed PR 8440: groups were flattened into one, with one lr and one decay.
    def build():
        model = network()
        W, b = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
        groups = [
            {"params": W[:1], "lr": 0.1, "weight_decay": 0.0},
            {"params": W[1:], "lr": 0.2},
            {"params": b, "lr": 0.3, "weight_decay": 0.25, "algorithm": "adamw"},
        ]
        return Muon(groups, lr=0.9, weight_decay=0.5)

    numbers = [(0.1, 0.0, 1), (0.2, 0.5, 2), (0.3, 0.25, 3)]
    opt, other = build(), build()
    for group in other.param_groups:
        group["lr"] = 0.0
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each in (opt, other):
        assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in each.param_groups] == numbers
        # Not only printed: without a gradient's direction, each group decays by its own numbers.
        for group in each.param_groups:
            for p in group["params"]:
                p.data.fill_(1.0)
                p.grad = torch.zeros_like(p)
        each.step()
        for lr, decay, _ in numbers:
            group = next(g for g in each.param_groups if g["lr"] == lr)
            assert all(torch.allclose(p, torch.tensor(1 - lr * decay)) for p in group["params"])


@pytest.mark.parametrize(
    "warmup",
    [
        lambda opt: schedulers.LinearLR(opt, 0.1, 1.0, total_iters=4),
        lambda opt: schedulers.LambdaLR(opt, lambda t: min(1.0, (t + 1) / 5)),
    ],
    ids=["LinearLR", "LambdaLR"],
)
def test_row_6_a_warm_up_ends_at_each_group_s_own_lr(warmup):
    # DeepSpeed 7713: the warm-up scheduler wrote one lr over muon_lr and adam_lr.
    model = network()
    opt = Muon(model, lr=0.02, scale="keller", adamw={"lr": 3e-4})
    scheduler = warmup(opt)
    for _ in range(6):
        filled(model.parameters())
        opt.step()
        scheduler.step()
    assert {g["algorithm"]: pytest.approx(g["lr"]) for g in opt.param_groups} == {"spectral": 0.02, "adamw": 3e-4}


@pytest.mark.parametrize("scale", ["keller", "mup", "adamw-rms"])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_row_12_a_convolution_steps_as_its_flattened_matrix(shape, scale):
    # ultralytics PR 25846: the factor came from the kernel's height and width, up to 5.3 times too small.
    flat = (shape[0], math.prod(shape[1:]))
    K, W = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(flat))
    G = gaussian(*shape).float()
    K.grad, W.grad = G.clone(), G.flatten(1).clone()
    convolution, matrix = (Muon([p], lr=0.1, scale=scale) for p in (K, W))
    assert convolution.metrics()["effective_lr"]["0.0"] == pytest.approx(0.1 * Scale(scale).factor(*flat), rel=1e-6)
    convolution.step()
    matrix.step()
    assert torch.equal(K.detach().flatten(1), W.detach())


@pytest.mark.parametrize("name", ["experts.w1", "unheard_of.bank"])
def test_row_13_the_expert_axis_is_a_batch_axis_by_declaration_and_by_no_name(name):
    # maxtext 4798: under another module name the expert axis was taken for a side of the matrix.
    def bank():
        return nn.Parameter(torch.zeros(6, 16, 8))

    with pytest.raises(ValueError, match="layout"):
        Muon([(name, bank())])
    B = bank()
    opt = Muon([{"params": [(name, B)], "layout": "experts"}], lr=1.0, weight_decay=0.0, scale="none")
    filled([B])
    (change,) = changes([B], opt)
    sigma = torch.linalg.svdvals(change)
    assert sigma.shape == (6, 8) and sigma.min() > 0.7 and sigma.max() < 1.3


def test_row_15_a_parameter_that_is_rerouted_keeps_its_lr_and_decay():
    # speculators PR 866, 1066: a table moved to AdamW also got a tenth of the lr and another decay, and stopped learning.
    def numbers(*rules, **options):
        opt = Muon(network(), lr=0.02, weight_decay=0.3, rules=rules, **options)
        return {
            name: (group["algorithm"], group["lr"], group["weight_decay"])
            for group in opt.param_groups
            for name in group["param_names"]
        }

    assert numbers()["0.weight"] == ("spectral", 0.02, 0.3)
    assert numbers(("0.weight", "adamw"))["0.weight"] == ("adamw", 0.02, 0.3)
    own = {"lr": 1e-4, "weight_decay": 0.0}
    for route in ("spectral", "adamw"):
        assert numbers(("0.weight", route, own))["0.weight"] == (route, 1e-4, 0.0)
        # An lr for AdamW groups as such is not the parameter's own.
        assert numbers(("0.weight", route, own), adamw={"lr": 3e-4})["0.weight"] == (route, 1e-4, 0.0)
    assert numbers(("0.weight", "adamw"))["1.weight"] == ("spectral", 0.02, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_row_16_the_decay_that_is_shown_is_the_decay_that_acts(dtype):
    # modded-nanogpt PR 279: decay 0.025 in the logs, none in the step. In bf16 a decay of 1e-3 rounds away to nothing.
    model = network(dtype)
    opt = Muon(model, lr=0.01, weight_decay=0.1)
    for p in model.parameters():
        p.data.fill_(1.0)
    steps = 100
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert {g["weight_decay"] for g in opt.param_groups} == {0.1}
    total, count = 0.0, 0
    for p in model.parameters():
        total, count = total + float(p.detach().double().sum()), count + p.numel()
    # 7264 entries: stochastic rounding leaves the mean within 1e-3.
    assert total / count == pytest.approx(0.999**steps, abs=2e-3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_row_17_the_momentum_of_bf16_weights_is_that_of_fp32_weights(nesterov):
    # torch.optim.Muon, pytorch PR 194664: without Nesterov the momentum of bf16 weights was normalised in place.
    def buffers(dtype):
        W = nn.Parameter(gaussian(32, 16).to(dtype))
        opt = Muon([W], nesterov=nesterov)
        for seed in range(3):
            W.grad = (100 * gaussian(32, 16, seed=seed)).to(torch.bfloat16).to(dtype)
            opt.step()
        return [t for key, t in opt.state[W].items() if t.shape == W.shape]

    half, full = buffers(torch.bfloat16), buffers(torch.float32)
    assert len(half) == len(full) == 1
    assert torch.equal(half[0], full[0]) and full[0].norm() > 100
