"""What the fuzz found once, as small cases: each was a silent mistake or a bare error of torch or LAPACK."""

import pytest
import torch
from torch import nn

import schatten


def matrix(*shape, **options):
    return nn.Parameter(torch.zeros(shape or (4, 4), **options))


@pytest.mark.parametrize("preset", [schatten.SOAPMuon, schatten.KLSOAP])
def test_soap_starts_on_graded_gradients(preset):
    # LAPACK's fp32 eigh did not converge on one in a hundred of these.
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        p = matrix(9, 7)
        p.grad = torch.randn(9, 7, generator=generator) * 10 ** (-38 * torch.rand(9, 7, generator=generator))
        preset([p]).step()
        assert p.isfinite().all()


def test_jaguar_refuses_an_adamw_group_by_name():
    opt = schatten.JaguarMuon([{"params": [matrix()]}, {"params": [nn.Parameter(torch.zeros(4))], "algorithm": "adamw"}])
    with pytest.raises(RuntimeError, match="algorithm='adamw'"):
        opt.step(lambda: torch.zeros(()))


def test_kahan_may_not_be_left_while_its_compensation_is_kept():
    p = matrix(dtype=torch.bfloat16)
    opt = schatten.Muon([p], rounding="kahan")
    p.grad = torch.ones_like(p)
    opt.step()
    opt.param_groups[0]["rounding"] = "nearest"
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="rounding is 'nearest' now"):
        opt.step()
    assert torch.equal(p, before)


def test_a_default_lr_is_checked_where_adamw_has_its_own():
    with pytest.raises(ValueError, match=r"lr must be finite and >= 0, got -1\.0"):
        schatten.NorMuon([{"params": [matrix()], "lr": 0.1}], lr=-1.0)


def test_hyperball_names_a_weight_decay_of_two_numbers():
    with pytest.raises(ValueError, match=r"weight_decay must be a number, got tensor"):
        schatten.Hyperball([matrix()], weight_decay=torch.tensor([0.1, 0.2]))


def test_scion_says_whose_weight_decay_is():
    with pytest.raises(ValueError, match="weight_decay is part of Scion's balls"):
        schatten.Scion([matrix()], weight_decay=0.1)


def test_a_gradient_that_is_nan_at_the_previous_weights_stays_in_no_state():
    p = nn.Parameter(torch.randn(4, 4))
    opt = schatten.MuonMVR([p], exact=True)
    for bad in (False, True):
        calls = []

        def closure(bad=bad, calls=calls):
            calls.append(1)
            opt.zero_grad()
            loss = p.square().sum() * (torch.nan if bad and len(calls) == 1 else 1.0)
            loss.backward()
            return loss

        opt.step(closure)
    assert all(t.isfinite().all() for t in opt.state[p].values())


def test_a_trust_region_of_radius_zero_leaves_weights_of_any_size():
    p = nn.Parameter(torch.full((3, 3), 1e30, dtype=torch.float64))
    opt = schatten.TrustRegion([p], lr=0.0, penalty=0.01 * schatten.maps.L1())
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("preset", [schatten.SpectralSGD, schatten.SpectralAdam])
def test_a_solver_is_checked_for_every_power(preset):
    with pytest.raises(TypeError, match="solver must compute"):
        preset([matrix()], p=1.0, solver="svd")


def test_a_measured_scale_of_directions_whose_squares_overflow_is_the_same():
    rms = schatten.scales.RMS(0.2)
    assert float(rms(torch.full((4, 4), 1e30))) == pytest.approx(0.2e-30, rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_axis_is_cut_into_empty_blocks(shape):
    for axis in ("fan_out", "fan_in"):
        (piece,) = schatten.layout.pieces(schatten.Layout(heads=2, axis=axis), shape)
        assert piece.of(torch.zeros(shape)).shape == piece.blocks


def test_soap_without_memory_follows_a_gradient_that_becomes_tiny():
    p = matrix(2, 3)
    opt = schatten.KLSOAP([p], betas=(0.0, 0.0), shampoo_beta=0.0)
    for size in (1.0, 1e-30):
        p.grad = torch.randn(2, 3) * size
        opt.step()
        assert p.isfinite().all() and all(t.isfinite().all() for t in opt.state[p].values())


def test_a_shampoo_beta_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="shampoo_beta must lie in"):
        schatten.SOAPMuon([matrix()], shampoo_beta="x")
