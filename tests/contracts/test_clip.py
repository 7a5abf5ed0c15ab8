"""Clipping: AdamW's gradients as torch clips them, those of scale-free rules not at all, and the norms of both."""

import copy

import pytest
import torch
from torch import nn

import schatten
from schatten import maps, retractions, scales, solvers
from schatten.clip import clip_grad_norm_, scale_free
from schatten.signals import AdamRatio, TwoBeta, VarianceReduced


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)).to(dtype)


def parts(net):
    """Parameters of AdamW, and matrices."""
    return [p for p in net.parameters() if p.ndim == 1], [p for p in net.parameters() if p.ndim == 2]


def filled(net, scale=3.0):
    torch.manual_seed(1)
    for p in net.parameters():
        p.grad = (scale * torch.randn(p.shape)).to(p.dtype)
    return net


def gradients(params):
    return [p.grad.clone() for p in params]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e9])
def test_adamw_s_gradients_are_clipped_as_torch_clips_them(dtype, max_norm, norm_type):
    net = filled(model(dtype))
    reference = copy.deepcopy(parts(net)[0])
    for q, p in zip(reference, parts(net)[0], strict=True):
        q.grad = p.grad.clone()
    norms = clip_grad_norm_(schatten.Muon(net), max_norm, norm_type=norm_type)
    expected = nn.utils.clip_grad_norm_(reference, max_norm, norm_type=norm_type)
    # torch takes norms of bf16 gradients in bf16; the factor is then rounded to it, too, as are the gradients.
    close = {"rtol": 2**-7, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(norms.adamw, expected.float(), **close)
    for p, q in zip(parts(net)[0], reference, strict=True):
        torch.testing.assert_close(p.grad, q.grad, **close)


def test_both_norms_are_those_before_clipping_and_scalars():
    net = filled(model())
    adamw, spectral = (torch.cat([p.grad.flatten() for p in part]).norm() for part in parts(net))
    norms = clip_grad_norm_(schatten.Muon(net), 1.0)
    torch.testing.assert_close(norms.adamw, adamw)
    torch.testing.assert_close(norms.spectral, spectral)
    assert norms.adamw.shape == norms.spectral.shape == ()
    assert norms.adamw.dtype == norms.spectral.dtype == torch.float32


def test_gradients_of_a_scale_free_rule_stay_bit_for_bit_and_are_the_same_tensors():
    net = filled(model())
    _, matrices = parts(net)
    before, objects = gradients(matrices), [p.grad for p in matrices]
    clip_grad_norm_(schatten.Muon(net), 1e-3)
    assert equal(gradients(matrices), before)
    assert all(p.grad is g for p, g in zip(matrices, objects, strict=True))


def test_the_size_of_matrix_gradients_does_not_clip_adamw_s():
    # Megatron-LM 5394: one norm over all let a large part clip the rest to nothing.
    results = []
    for factor in (1.0, 1e6):
        net = filled(model())
        vectors, matrices = parts(net)
        for p in matrices:
            p.grad.mul_(factor)
        clip_grad_norm_(schatten.Muon(net), 1.0)
        results.append(gradients(vectors))
    assert equal(*results)


@pytest.mark.parametrize("kind", [schatten.PolarGrad, schatten.MuonMVR], ids=lambda kind: kind.__name__)
def test_a_rule_that_is_not_scale_free_is_clipped_by_its_own_norm(kind):
    net = filled(model())
    vectors, matrices = parts(net)
    norm = torch.cat([p.grad.flatten() for p in matrices]).norm()
    expected = [p.grad * (1.0 / norm) for p in matrices]
    norms = clip_grad_norm_(kind(net), 1.0)
    torch.testing.assert_close(norms.spectral, norm)
    for p, g in zip(matrices, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=0)  # torch adds 1e-6 to the norm
    assert torch.cat([p.grad.flatten() for p in vectors]).norm() <= 1.0


def test_only_the_groups_that_feel_the_norm_are_clipped_by_it():
    rules = [schatten.Rule(), schatten.Rule(map=maps.Power(1.0, over="entries"))]
    scale_free_one, linear = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    groups = [{"params": [p], "rule": rule} for p, rule in zip((scale_free_one, linear), rules, strict=True)]
    opt = schatten.SpectralOptimizer(groups, momentum=0.9)
    scale_free_one.grad, linear.grad = torch.full((4, 4), 5.0), torch.full((4, 4), 0.2)
    norms = clip_grad_norm_(opt, 1.0)
    # The linear one's own norm is 0.8, below 1, whatever the other's is.
    assert (scale_free_one.grad == 5).all() and (linear.grad == 0.2).all()
    torch.testing.assert_close(norms.spectral, torch.tensor((20.0**2 + 0.8**2) ** 0.5))
    assert norms.adamw == 0


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_norms_neither_overflow_nor_vanish(size):
    net = model()
    for p in net.parameters():
        p.grad = torch.full_like(p, size)
    counts = [sum(p.numel() for p in part) for part in parts(net)]
    norms = clip_grad_norm_(schatten.Muon(net), size)
    for norm, count in zip(norms, counts, strict=True):
        torch.testing.assert_close(norm / size, torch.tensor(count**0.5))


@pytest.mark.parametrize("size", [1e25, 1e30])
def test_gradients_whose_squares_overflow_are_clipped(size):
    net = model()
    for p in net.parameters():
        p.grad = torch.full_like(p, size)
    clip_grad_norm_(schatten.Muon(net), 1.0)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parts(net)[0]]).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_leaves_its_part_alone_and_the_step_skips_what_made_it_so(bad):
    net = filled(model())
    opt = schatten.Muon(net)
    net[1].bias.grad[3] = bad
    before = [g.nan_to_num(7, 7, 7) for g in gradients(net.parameters())]
    weight = net[1].bias.detach().clone()
    norms = clip_grad_norm_(opt, 1.0)
    assert not norms.adamw.isfinite() and norms.spectral.isfinite()
    assert equal([g.nan_to_num(7, 7, 7) for g in gradients(net.parameters())], before)
    opt.step()
    assert torch.equal(net[1].bias, weight) and opt.metrics()["skipped"] == {"1.bias": 1}
    assert all(p.isfinite().all() for p in net.parameters())


def test_parameters_without_gradient_count_as_nothing():
    net = model()
    opt = schatten.Muon(net)
    assert clip_grad_norm_(opt, 1.0) == (0, 0)
    net[0].bias.grad = torch.full((8,), 2.0)
    norms = clip_grad_norm_(opt, 1.0)
    torch.testing.assert_close(norms.adamw, torch.tensor(32**0.5))
    assert norms.spectral == 0 and all(p.grad is None for name, p in net.named_parameters() if name != "0.bias")


# torch says once a process that sparse tensors are not checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_clipped_by_the_norm_of_their_sums():
    table = nn.Parameter(torch.zeros(5, 2))
    opt = schatten.Muon([{"params": [nn.Parameter(torch.zeros(2, 2))]}, {"params": [table], "algorithm": "adamw"}])
    # Row 1 occurs twice, so that its entries are 3 + 1.
    table.grad = torch.sparse_coo_tensor([[1, 3, 1]], torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), (5, 2))
    assert clip_grad_norm_(opt, 1.0).adamw == 5
    torch.testing.assert_close(table.grad.to_dense()[[1, 3]], torch.tensor([[0.8, 0.0], [0.0, 0.6]]))


def test_infinity_measures_and_clips_nothing():
    net = filled(model())
    before = gradients(net.parameters())
    assert clip_grad_norm_(schatten.Muon(net), float("inf")).adamw > 1
    assert equal(gradients(net.parameters()), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_norm": -1.0}, "max_norm must be a number >= 0, got -1.0"),
        ({"max_norm": float("nan")}, "max_norm must be a number >= 0, got nan"),
        ({"max_norm": 1.0, "norm_type": 0.0}, "norm_type must be positive, such as 2.0 or infinity, got 0.0"),
    ],
    ids=str,
)
def test_what_is_no_threshold_and_no_norm_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        clip_grad_norm_(schatten.Muon(model()), **options)


def test_clipping_changes_no_first_step_of_muon_s_matrices_and_the_steps_of_adamw():
    results = []
    for max_norm in (float("inf"), 1e-2):
        net = filled(model(torch.float64))
        opt = schatten.Muon(net, lr=0.1, adamw={"eps": 1e-3}, solver=solvers.svd())
        clip_grad_norm_(opt, max_norm)
        opt.step()
        results.append(parts(net))
    (vectors, matrices), (clipped, same) = results
    assert equal([p.detach() for p in matrices], [p.detach() for p in same])
    assert all(not torch.equal(p, q) for p, q in zip(vectors, clipped, strict=True))


def scaled_run(max_norm, order):
    net = model(torch.float64)
    opt = schatten.Muon(net, lr=0.1, adamw={"eps": 1e-2}, solver=solvers.svd())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=order is not None)
    torch.manual_seed(2)
    norms = []
    for X in torch.randn(3, 16, 6, dtype=torch.float64):
        opt.zero_grad()
        scaler.scale(10 * net(X).square().mean()).backward()
        if order == "unscaled":
            scaler.unscale_(opt)
        norms.append(float(clip_grad_norm_(opt, max_norm).adamw))
        scaler.step(opt)
        scaler.update()
    return norms, [p.detach() for p in net.parameters()]


def test_with_a_grad_scaler_unscaling_comes_first():
    norms, weights = scaled_run(0.05, None)
    assert min(norms) > 0.05  # it clips
    same_norms, same_weights = scaled_run(0.05, "unscaled")
    # A power of two divides exactly; norms are reported in fp32.
    assert norms == pytest.approx(same_norms, rel=1e-6)
    for p, q in zip(weights, same_weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    wrong_norms, wrong = scaled_run(0.05, "scaled")
    assert min(wrong_norms) > 100 * max(norms)
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(weights, wrong, strict=True))


NOT_SCALE_FREE = {"MuonMVR", "PolarGrad", "SimplifiedMuon"}


def test_which_presets_are_scale_free(any_preset):
    opt = any_preset([nn.Parameter(torch.randn(6, 4))])
    (group,) = opt.param_groups
    assert scale_free(opt.rule(group), group["weight_decay"]) == (any_preset.__name__ not in NOT_SCALE_FREE)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (schatten.Rule(map=maps.Power(0.05)), False),
        (schatten.Rule(map=maps.Huber(1e-3)), False),
        (schatten.Rule(map=maps.Huber(1e4)), False),
        (schatten.Rule(map=maps.Huber(0.1, relative="frobenius")), True),
        (schatten.Rule(map=maps.Nuclear() + maps.Frobenius()), True),
        (schatten.Rule(map=maps.Power(0.5), scale=scales.RMS()), True),
        (schatten.Rule(AdamRatio(), maps.Power(1.0, over="entries")), True),
        (schatten.Rule(TwoBeta(), maps.L1()), True),
        (schatten.Rule(VarianceReduced(clip=True)), False),
        (schatten.Rule(VarianceReduced(clip=False)), True),
        (schatten.Rule(map=maps.Power(1.0, over="entries"), retraction=retractions.CompositeStep()), True),
        (schatten.Rule(map=maps.Power(1.0, over="entries"), retraction=retractions.FixedNorm()), True),
    ],
    ids=str,
)
def test_scale_freeness_is_of_the_whole_rule(rule, expected):
    assert scale_free(rule) == expected


def test_a_trust_region_with_decay_is_not_scale_free():
    rule = schatten.Rule(map=maps.Power(1.0, over="entries"), retraction=retractions.CompositeStep())
    assert scale_free(rule, 0.0) and not scale_free(rule, 0.1)


def test_a_slot_without_a_hash_is_asked_all_the_same():
    class Listed(schatten.directions.NoK):
        __hash__ = None

        def __call__(self, S, state, group):
            return S, {}

    assert not scale_free(schatten.Rule(map=Listed()))
