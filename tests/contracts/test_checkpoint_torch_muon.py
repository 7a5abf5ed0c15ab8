"""torch.optim.Muon's checkpoints: its state is taken over where the rules agree, and refused where they do not."""

import copy

import pytest
import torch
from torch import nn

import schatten

SHAPES = [(6, 4), (3, 5), (6, 4)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def train(opt, params, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
        opt.step()


def trained_by_torch(steps=4, dtype=torch.float32, **options):
    params = parameters(dtype)
    opt = torch.optim.Muon(params, lr=0.03, weight_decay=0.2, momentum=0.9, **options)
    train(opt, params, range(steps))
    return opt, params


@pytest.mark.parametrize(("theirs", "ours"), [(None, "keller"), ("original", "keller"), ("match_rms_adamw", "adamw-rms")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_muons_state_and_numbers_continue_as_our_own_would(theirs, ours, nesterov):
    opt, params = trained_by_torch(adjust_lr_fn=theirs, nesterov=nesterov)
    resumed, twin = ([nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
    other = schatten.Muon(resumed, lr=0.9, scale=ours, nesterov=nesterov)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert {k: other.param_groups[0][k] for k in ("lr", "weight_decay", "momentum")} == {
        "lr": 0.03,
        "weight_decay": 0.2,
        "momentum": 0.9,
    }
    # A schatten Muon whose momentum is set by hand to torch's.
    by_hand = schatten.Muon(twin, lr=0.03, weight_decay=0.2, momentum=0.9, scale=ours, nesterov=nesterov)
    for p, q in zip(twin, params, strict=True):
        by_hand.state[p]["momentum_buffer"].copy_(opt.state[q]["momentum_buffer"])
    train(other, resumed, range(4, 8))
    train(by_hand, twin, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(resumed, twin, strict=True))


def test_with_torchs_solver_the_continued_run_stays_with_torchs_own():
    opt, params = trained_by_torch()
    start = [p.detach().clone() for p in params]
    resumed = [nn.Parameter(w.clone()) for w in start]
    other = schatten.Muon(resumed, scale="keller", solver=schatten.solvers.newton_schulz(dtype="bfloat16"))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, range(4, 12))
    train(other, resumed, range(4, 12))
    for p, q, w in zip(resumed, params, start, strict=True):
        # bf16 products: measured 1 % of the change; with a momentum that starts from zero 20 % or more.
        assert (p - q).norm() < 0.05 * (q - w).norm()


def test_bf16_momentum_of_torch_becomes_fp32_momentum():
    opt, params = trained_by_torch(dtype=torch.bfloat16)
    other = schatten.Muon(resumed := parameters(torch.bfloat16), scale="keller")
    other.load_state_dict(opt.state_dict())
    for p, q in zip(resumed, params, strict=True):
        buffer = other.state[p]["momentum_buffer"]
        assert buffer.dtype == torch.float32 and torch.equal(buffer, opt.state[q]["momentum_buffer"].float())


def test_a_checkpoint_from_before_the_first_step_loads_with_zero_momentum():
    other = schatten.Muon(params := parameters(), scale="keller")
    train(other, params, range(1))
    other.load_state_dict(trained_by_torch(steps=0)[0].state_dict())
    assert all(other.state[p]["momentum_buffer"].count_nonzero() == 0 for p in params)
    train(other, params, range(1, 2))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({}, {}, "scale='keller'"),
        ({"adjust_lr_fn": "match_rms_adamw"}, {"scale": "keller"}, "scale='adamw-rms'"),
        ({"nesterov": False}, {"scale": "keller"}, "nesterov=False"),
        ({}, {"scale": "keller", "nesterov": False}, "nesterov=True"),
        ({}, {"scale": "keller", "decay": "implicit"}, "explicit"),
    ],
    ids=str,
)
def test_another_rule_is_refused_with_the_options_that_would_fit(theirs, ours, words):
    opt, _ = trained_by_torch(**theirs)
    other = schatten.Muon(params := parameters(), lr=0.7, **ours)
    with pytest.raises(ValueError, match="another rule") as refused:
        other.load_state_dict(opt.state_dict())
    assert words in str(refused.value)
    assert other.param_groups[0]["lr"] == 0.7
    assert all(other.state[p]["momentum_buffer"].count_nonzero() == 0 for p in params)


def test_an_optimizer_with_an_adamw_group_refuses_a_checkpoint_of_matrices_only():
    matrices, bias = parameters(), nn.Parameter(torch.zeros(5))
    spectral, adamw = {"params": matrices}, {"params": [bias], "algorithm": "adamw"}
    saved = torch.optim.Muon([{"params": parameters()}, {"params": parameters()[:1]}]).state_dict()
    with pytest.raises(ValueError, match=r"params\[0\] was trained by Muon, here by AdamW"):
        schatten.Muon([spectral, adamw], scale="keller").load_state_dict(saved)


def test_another_number_of_parameters_is_refused_with_both_numbers():
    opt, _ = trained_by_torch()
    with pytest.raises(ValueError, match="groups of 3 parameters, this optimizer of 2"):
        schatten.Muon(parameters()[:2], scale="keller").load_state_dict(opt.state_dict())


def test_a_rule_that_keeps_a_sum_gets_the_sum_that_the_average_stands_for():
    opt, _ = trained_by_torch()
    resumed, twin = parameters(), parameters()
    summed, averaged = (schatten.Muon(of, scale="keller", form=form) for of, form in ((resumed, "sum"), (twin, "ema")))
    for other, of in ((summed, resumed), (averaged, twin)):
        other.load_state_dict(opt.state_dict())
        train(other, of, range(4, 6))
    for p, q in zip(resumed, twin, strict=True):
        assert torch.allclose(summed.state[p]["momentum_buffer"] * (1 - 0.9), averaged.state[q]["momentum_buffer"], rtol=1e-5)
        # The same direction of two fp32 sums.
        assert torch.allclose(p, q, atol=1e-5)


def test_another_shape_is_refused_naming_the_parameter():
    opt, _ = trained_by_torch()
    params = [("a", parameters()[0]), ("b", nn.Parameter(torch.zeros(5, 3))), ("c", parameters()[2])]
    with pytest.raises(ValueError, match=r"'b' of shape \(5, 3\)"):
        schatten.Muon(params, scale="keller").load_state_dict(opt.state_dict())
