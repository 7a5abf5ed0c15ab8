"""Measures of gradients, updates and spectra against their definitions in fp64, and cheap ways against exact ones."""

import math

import pytest
import torch
from torch import nn

import schatten
from schatten.diagnostics.alignment import Alignment, alignment, cosine
from schatten.diagnostics.attention import Attention, logit_bound
from schatten.diagnostics.conditioning import Condition, condition_number, conditioning
from schatten.diagnostics.core import Block, Whole
from schatten.diagnostics.effective_ranks import effective_rank, nuclear_ratio, stable_rank
from schatten.diagnostics.gradient import Gradient
from schatten.diagnostics.nuclear_norm import MSGN, nuclear_norm
from schatten.diagnostics.spectrum import Spectrum, spectrum
from schatten.diagnostics.update import Update, rms_ratio, spectral_ratio, update_rms
from tests.contracts.measure_laws import matrix

SHAPES = [(5, 5), (3, 8), (8, 3), (1, 4), (4, 1), (24, 16)]


def svdvals(X):
    return torch.linalg.svdvals(X.detach().double())


@pytest.mark.parametrize("shape", SHAPES)
def test_measures_are_those_of_the_singular_values(shape):
    G, D, W = (matrix(*shape, seed=seed) for seed in range(3))
    s = svdvals(G)
    p = s / s.sum()
    inner = float((G * D).sum())
    expected = {
        nuclear_ratio: s.sum() ** 2 / (s**2).sum(),
        stable_rank: (s**2).sum() / s[0] ** 2,
        effective_rank: math.exp(-float((p * p.log()).sum())),
        condition_number: s[0] / s[-1],
        update_rms: G.square().mean().sqrt(),
    }
    for measure, value in expected.items():
        assert float(measure(G)) == pytest.approx(float(value), rel=1e-9), measure.__name__
    assert float(alignment(G, D)) == pytest.approx(inner / float(s.sum() * svdvals(D)[0]), rel=1e-9)
    assert float(cosine(G, D)) == pytest.approx(inner / float(G.norm() * D.norm()), rel=1e-9)
    assert float(rms_ratio(G, W)) == pytest.approx(float(G.norm() / W.norm()), rel=1e-9)
    assert float(spectral_ratio(G, W)) == pytest.approx(float(s[0] / svdvals(W)[0]), rel=1e-9)
    torch.testing.assert_close(spectrum(G), s)
    # fp32 rounds each by some eps of the largest.
    torch.testing.assert_close(spectrum(G, dtype=torch.float32).double(), s, rtol=0, atol=1e-6 * float(s[0]))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (128, 40)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_nuclear_norm_by_one_msgn_keeps_the_error_it_states(shape, scale):
    for G in (matrix(*shape).float() * scale, torch.randn(*shape) * scale):
        s = svdvals(G)
        small = s[s < 1e-3 * s.square().sum().sqrt()].sum()
        # The stated 0.0016, and fp32's rounding of a sum.
        assert -(0.0016 * s.sum() + small) <= nuclear_norm(G) - s.sum() <= 0.0016 * s.sum() + 1e-5 * s.sum()
        assert float(nuclear_norm(G, solver=schatten.solvers.svd())) == pytest.approx(float(s.sum()), rel=1e-6)


def test_the_solver_of_the_nuclear_norm_has_the_error_it_states():
    assert MSGN.error <= 0.0016 and len(MSGN.quintics) == 6


def test_a_gaussians_nuclear_norm_by_one_msgn_is_right_to_a_fifth_of_a_percent():
    G = torch.randn(256, 256)
    assert float(nuclear_norm(G)) == pytest.approx(float(svdvals(G).sum()), rel=2e-3)


def of(**tensors):
    return Block("w", schatten.Rule(), {}, **{name: t[None] for name, t in tensors.items()})


@pytest.mark.parametrize("falling", [False, True])
def test_the_gradient_quantity_agrees_with_its_exact_form(falling):
    G = matrix(48, 32).float() * 1e-6 if falling else torch.randn(32, 48)
    W = torch.zeros_like(G)
    quick, exact = (Gradient(exact=way)(of(weight=W, gradient=G)) for way in (False, True))
    # 16 power iterations from below: 2 % of a Gaussian's spectral norm, 4 % of its square.
    within = {"frobenius": 1e-6, "nuclear": 2e-3, "nuclear_ratio": 4e-3, "stable_rank": 0.06}
    for column, tolerance in within.items():
        assert float(quick[column]) == pytest.approx(float(exact[column]), rel=tolerance), column
    assert float(exact["effective_rank"]) == pytest.approx(float(effective_rank(G)))


def test_the_alignment_quantity_agrees_with_the_exact_one():
    G, M, U = torch.randn(20, 30), torch.randn(20, 30), -0.02 * schatten.solvers.svd()(torch.randn(20, 30))
    found = Alignment()(of(weight=G, gradient=G, momentum=M, update=U))
    for column, D in (("update", -U), ("momentum", M)):
        assert float(found[column]) == pytest.approx(float(alignment(G, D)), rel=0.05)
        assert float(found[f"{column}_cosine"]) == pytest.approx(float(cosine(G, D)), abs=1e-6)


def test_the_update_quantity_agrees_with_svd():
    W, U = torch.randn(20, 30), 0.01 * matrix(20, 30).float()
    found = Update()(of(weight=W, update=U))
    assert float(found["spectral_ratio"]) == pytest.approx(float(spectral_ratio(U, W)), rel=0.05)
    assert float(found["spectral"]) == pytest.approx(float(svdvals(U)[0]), rel=0.02)
    assert float(found["rms_ratio"]) == pytest.approx(float(rms_ratio(U, W)), rel=1e-6)
    assert float(found["rms"]) == pytest.approx(float(update_rms(U)), rel=1e-6)


def test_the_rms_of_a_muon_step_is_that_of_its_scale_and_its_alignment_1():
    torch.manual_seed(1)
    W = nn.Parameter(torch.randn(12, 12))
    map = schatten.maps.Nuclear(schatten.solvers.svd())
    opt = schatten.SpectralOptimizer([W], schatten.Rule(map=map), lr=0.02, weight_decay=0.1, momentum=0.0)
    before, W.grad = W.detach().clone(), torch.randn(12, 12)
    opt.step()
    update = W.detach() - (1 - 0.02 * 0.1) * before
    block = of(weight=before, gradient=W.grad, momentum=W.grad, update=update)
    # Differences of fp32 weights of size 1 know an update of 0.004 to some 1e-5 of it.
    assert float(Update()(block)["rms"]) == pytest.approx(0.02 * block.factor / math.sqrt(12), rel=1e-3)
    assert float(alignment(W.grad, -update)) == pytest.approx(1, abs=1e-3)


def test_the_conditioning_quantity_measures_the_rules_own_direction():
    M = matrix(16, 16).float()
    rule = schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.newton_schulz()))
    found = Condition()(Block("w", rule, {}, M[None], momentum=M[None]))
    s, d = svdvals(M), svdvals(rule.map.grad(M))
    assert float(found["momentum"]) == pytest.approx(float(s[0] / s[-1]), rel=1e-6)
    assert float(found["direction"]) == pytest.approx(float(d[0] / d[-1]), rel=1e-6)
    assert float(found["exact"]) == pytest.approx(1, rel=1e-9)
    # The published quintic leaves singular values between 0.68 and 1.14, and smaller ones of an unequal matrix.
    assert float(found["direction"]) > 1.2


def test_conditioning_looks_into_sums_and_multiples_of_maps():
    S = matrix(6, 6)
    exact = schatten.maps.Nuclear(schatten.solvers.svd())
    rough = schatten.maps.Nuclear(schatten.solvers.newton_schulz())
    total = conditioning(0.5 * rough + 0.5 * schatten.maps.Frobenius(), S)
    d = svdvals(0.5 * exact.grad(S) + 0.5 * schatten.maps.Frobenius().grad(S))
    assert float(total.exact) == pytest.approx(float(d[0] / d[-1]), rel=1e-9)
    assert float(total.after) != pytest.approx(float(total.exact), rel=1e-2)


def test_a_map_that_drops_singular_values_has_an_infinite_condition_number():
    found = conditioning(schatten.maps.KyFan(2, solver=schatten.solvers.svd()), matrix(5, 5))
    assert math.isinf(float(found.exact)) or float(found.exact) > 1e12


def test_the_spectrum_quantity_has_the_quantiles_and_counts_of_the_singular_values():
    W, M = matrix(40, 30), 1e-5 * matrix(30, 40)
    quantity = Spectrum(bins=12)
    found = quantity(of(weight=W, momentum=M))
    for name, X in (("weight", W), ("momentum", M)):
        s = svdvals(X)
        for column, q in (("max", 1.0), ("q90", 0.9), ("median", 0.5), ("q10", 0.1), ("min", 0.0)):
            assert float(found[f"{name}_{column}"]) == pytest.approx(float(s.quantile(q)), rel=1e-9)
        assert float(found[f"{name}_stable_rank"]) == pytest.approx(float(stable_rank(X)), rel=1e-9)
        counts = torch.histogram(s, quantity.edges(name)).hist
        assert found[f"{name}_histogram"][0].tolist() == counts.tolist()


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("width", [5, 24])
def test_logit_bounds_are_those_of_explicit_products(heads, key_heads, width):
    Q, K = torch.randn(heads * 8, width), torch.randn(key_heads * 8, width)
    found = logit_bound(Q, K, heads=heads, key_heads=key_heads, radius=3.0)
    for h in range(heads):
        q, k = Q[8 * h : 8 * h + 8].double(), K.unflatten(0, (key_heads, 8))[h * key_heads // heads].double()
        scale = 9 / math.sqrt(8)
        assert float(found.product[h]) == pytest.approx(float(svdvals(q)[0] * svdvals(k)[0]) * scale, rel=1e-9)
        assert float(found.joint[h]) == pytest.approx(float(svdvals(q.mT @ k)[0]) * scale, rel=1e-9)


class Attentive(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16, bias), nn.Linear(16, 8, bias), nn.Linear(16, 8, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_the_attention_quantity_finds_projections_by_name(bias):
    layers = nn.ModuleList(Attentive(bias) for _ in range(3))
    with torch.no_grad():
        layers[1].q_proj.weight *= 3
    found = Attention(heads=4, key_heads=2)(Whole(dict(layers.named_parameters()), ()))
    own = [
        logit_bound(m.q_proj.weight, m.k_proj.weight, heads=4, key_heads=2, query_bias=m.q_proj.bias, key_bias=m.k_proj.bias)
        for m in layers
    ]
    bare = [logit_bound(m.q_proj.weight, m.k_proj.weight, heads=4, key_heads=2, radius=1, scale=1) for m in layers]
    assert found["products"].tolist() == pytest.approx([float(b.product.max()) for b in bare])
    assert found["joints"].tolist() == pytest.approx([float(b.joint.max()) for b in bare])
    assert float(found["product"]) == pytest.approx(float(bare[1].product.max()))
    assert float(found["joint"]) == pytest.approx(max(float(b.joint.max()) for b in bare))
    assert float(found["bound"]) == pytest.approx(max(float(b.product.max()) for b in own))
    assert float(found["joint_bound"]) == pytest.approx(max(float(b.joint.max()) for b in own))
    assert set(found) == set(Attention.columns)
    # Without the heads' number no head and no logit's scale is known.
    whole = Attention()(Whole(dict(layers.named_parameters()), ()))
    assert set(whole) == {"product", "products"}
    products = [float(svdvals(m.q_proj.weight)[0] * svdvals(m.k_proj.weight)[0]) for m in layers]
    assert whole["products"].tolist() == pytest.approx(products)
    assert float(whole["product"]) == pytest.approx(max(products))
    assert bool((whole["products"] >= found["products"]).all())


@pytest.mark.parametrize("name", ["h.0.attn.qkv.weight", "attn.in_proj_weight", "h.0.attn.c_attn.weight", "attn.Wqkv.weight"])
def test_the_attention_quantity_cuts_fused_projections(name):
    W, b = torch.randn(48, 16), torch.randn(48)
    stored = W.mT if "c_attn" in name else W
    fused = Attention(heads=4)(Whole({name.lower(): stored, name.lower().replace("weight", "bias"): b}, ()))
    own = logit_bound(W[:16], W[16:32], heads=4, query_bias=b[:16], key_bias=b[16:32])
    assert float(fused["bound"]) == pytest.approx(float(own.product.max()))
    assert float(fused["joint_bound"]) == pytest.approx(float(own.joint.max()))


def test_the_attention_quantity_reads_grouped_queries_of_a_fused_projection():
    W = torch.randn(8 * (4 + 2 + 2), 24)
    found = Attention(heads=4, key_heads=2)(Whole({"attn.qkv_proj.weight": W}, ()))
    own = logit_bound(W[:32], W[32:48], heads=4, key_heads=2)
    assert float(found["bound"]) == pytest.approx(float(own.product.max()))
    with pytest.raises(ValueError, match="is not q, k and v of heads=None"):
        Attention()(Whole({"attn.qkv_proj.weight": W}, ()))


@pytest.mark.parametrize("name", ["mamba.in_proj.weight", "attn.query_key_value.weight", "v_proj.weight", "attn.q_norm.weight"])
def test_the_attention_quantity_refuses_a_model_without_projections_it_knows(name):
    with pytest.raises(ValueError, match=f"by name, of {name}: pass"):
        Attention()(Whole({name: torch.randn(24, 8)}, ()))
