"""Identities of the literature about gradients' spectra, alignment, conditioning and attention logits, one in each test."""

import math

import pytest
import torch
from torch.nn.functional import normalize

import schatten
from schatten.diagnostics.alignment import alignment, cosine
from schatten.diagnostics.attention import logit_bound
from schatten.diagnostics.conditioning import condition_number, conditioning
from schatten.diagnostics.effective_ranks import effective_rank, nuclear_ratio, stable_rank
from schatten.diagnostics.update import update_rms
from schatten.maps import Frobenius, Nuclear, Power
from schatten.solvers import newton_schulz, svd, tower
from tests.contracts.measure_laws import matrix, rotation


def with_spectrum(s, m=8, n=8):
    s = torch.as_tensor(s, dtype=torch.float64)
    return (rotation(m, 1)[:, : len(s)] * s) @ rotation(n, 2)[:, : len(s)].mT


@pytest.mark.parametrize("seed", range(5))
def test_stable_rank_nuclear_ratio_and_effective_rank_come_in_this_order(seed):
    X = matrix(9, 6, seed=seed)
    assert 1 < float(stable_rank(X)) < float(nuclear_ratio(X)) < float(effective_rank(X)) < 6


def test_the_three_ranks_of_a_known_spectrum():
    X = with_spectrum([2.0, 1.0, 1.0])
    assert float(stable_rank(X)) == pytest.approx(6 / 4)
    assert float(nuclear_ratio(X)) == pytest.approx(16 / 6)
    # Roy and Vetterli: p = (1/2, 1/4, 1/4) has an entropy of 1.5 log 2.
    assert float(effective_rank(X)) == pytest.approx(2**1.5)


def test_the_polar_factor_is_aligned_with_its_gradient_and_no_direction_more():
    G = matrix(6, 9)
    assert float(alignment(G, svd()(G))) == pytest.approx(1)
    for _ in range(20):
        assert abs(float(alignment(G, torch.randn(6, 9, dtype=torch.float64)))) < 1
    assert float(alignment(G, -svd()(G))) == pytest.approx(-1)


def test_the_gradient_itself_has_alignment_fro_squared_by_nuc_op():
    G = with_spectrum([3.0, 1.0])
    assert float(alignment(G, G)) == pytest.approx(10 / (4 * 3))
    assert float(cosine(G, G)) == pytest.approx(1)


def test_the_cosine_of_gradient_and_polar_factor_is_the_root_of_the_nuclear_ratio_by_the_rank():
    G = matrix(7, 5)
    assert float(cosine(G, svd()(G))) == pytest.approx(math.sqrt(float(nuclear_ratio(G)) / 5))


def test_an_orthogonal_update_has_rms_one_by_the_root_of_its_longer_side():
    assert float(update_rms(svd()(matrix(4, 25)))) == pytest.approx(1 / 5)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9)])
def test_a_spectral_power_takes_the_condition_number_to_its_power(p, shape):
    S = matrix(*shape)
    before, after, exact = conditioning(Power(p, solver=svd()), S)
    assert float(after) == pytest.approx(float(before) ** p, rel=1e-6)
    assert float(exact) == pytest.approx(float(before) ** p, rel=1e-6)


def test_muon_takes_the_condition_number_to_1():
    assert float(conditioning(Nuclear(svd()), matrix(6, 4)).after) == pytest.approx(1)


@pytest.mark.parametrize("K", [Power(0.5), Power(0.25)], ids=repr)
def test_the_tower_keeps_the_power_of_the_condition_number_within_its_error(K):
    S = with_spectrum(torch.logspace(0, -2, 8)).float()
    found = conditioning(K, S)
    assert float(found.exact) == pytest.approx(100**K.p, rel=1e-4)
    # Each singular value is right to some 5 %, so their quotient to 10 %.
    assert float(found.after) == pytest.approx(float(found.exact), rel=0.1)


def test_newton_schulz_leaves_a_condition_number_above_1_that_the_exact_polar_factor_has_not():
    S = with_spectrum(torch.logspace(0, -2, 8)).float()
    found = conditioning(Nuclear(newton_schulz()), S)
    assert float(found.exact) == pytest.approx(1, abs=1e-6)
    # Five published quintics send [0.01, 1] into [0.68, 1.14] (Frobenius-normalised; seeds 2.2).
    assert 1.1 < float(found.after) < 1.14 / 0.68


def test_a_scale_and_a_rotation_before_a_power_change_nothing():
    S, K = matrix(6, 6), Power(0.5, solver=svd())
    first, second = conditioning(K, S), conditioning(K, 1e4 * rotation(6, 3) @ S)
    for a, b in zip(first, second, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-6)


def test_momentum_sgd_keeps_the_condition_number():
    S = matrix(6, 6)
    assert float(conditioning(Frobenius(), S).after) == pytest.approx(float(condition_number(S)), rel=1e-9)
    assert float(conditioning(Power(1.0, solver=tower()), S.float()).after) == pytest.approx(
        float(condition_number(S)), rel=0.1
    )


# -- attention ---------------------------------------------------------------------------------------------------------


def logits(Q, K, x, y, heads, key_heads, bq=0.0, bk=0.0):
    """The largest |logit| of each head over pairs of tokens x and y, (tokens, fan_in), in fp64."""
    q = (x.double() @ Q.mT.double() + bq).unflatten(-1, (heads, -1)).movedim(-2, 0)
    k = (y.double() @ K.mT.double() + bk).unflatten(-1, (key_heads, -1)).movedim(-2, 0).repeat_interleave(heads // key_heads, 0)
    return (q @ k.mT).abs().amax((-2, -1)) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_no_inputs_within_the_radius_exceed_the_bounds(heads, key_heads, bias):
    Q, K = torch.randn(heads * 4, 16), torch.randn(key_heads * 4, 16)
    bq, bk = (torch.randn(heads * 4), torch.randn(key_heads * 4)) if bias else (None, None)
    found = logit_bound(Q, K, heads=heads, key_heads=key_heads, query_bias=bq, key_bias=bk)
    # RMSNorm's outputs have norm sqrt(16).
    x, y = (4 * normalize(torch.randn(1500, 16), dim=-1) for _ in range(2))
    seen = logits(Q, K, x, y, heads, key_heads, *((bq, bk) if bias else (0.0, 0.0)))
    assert bool((seen <= found.joint).all()) and bool((found.joint <= found.product).all())
    # They are bounds of the right size, not merely large.
    assert bool((seen > 0.3 * found.joint).all())


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_some_inputs_reach_the_joint_bound_of_each_head(heads, key_heads):
    Q, K = torch.randn(heads * 4, 16), torch.randn(key_heads * 4, 16)
    found = logit_bound(Q, K, heads=heads, key_heads=key_heads, radius=2.0)
    for h in range(heads):
        q, k = Q.double()[4 * h : 4 * h + 4], K.double().unflatten(0, (key_heads, 4))[h // (heads // key_heads)]
        U, _, Vh = torch.linalg.svd(q.mT @ k)
        seen = logits(Q, K, 2 * U[:, :1].mT, 2 * Vh[:1], heads, key_heads)
        assert float(seen[h]) == pytest.approx(float(found.joint[h]), rel=1e-9)


def test_a_heads_joint_bound_may_be_far_below_the_product():
    # What the query writes into its first feature no key reads.
    Q, K = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    found = logit_bound(Q, K, radius=1.0, scale=1.0)
    assert float(found.product) == pytest.approx(1) and float(found.joint) == pytest.approx(0, abs=1e-12)


def test_one_feature_with_biases_reaches_both_bounds():
    q, k, bq, bk = (torch.tensor([value]) for value in (2.0, 3.0, 0.5, 0.25))
    found = logit_bound(q[None], k[None], radius=4.0, query_bias=bq, key_bias=bk)
    for bound in found:
        assert float(bound) == pytest.approx((2 * 4 + 0.5) * (3 * 4 + 0.25))


def test_a_gain_of_the_norm_before_counts_as_part_of_the_weights():
    Q, K, gain = torch.randn(8, 16), torch.randn(8, 16), torch.rand(16) * 3
    found = logit_bound(Q, K, heads=2, gain=gain)
    x, y = (4 * normalize(torch.randn(1500, 16), dim=-1) * gain for _ in range(2))
    assert bool((logits(Q, K, x, y, 2, 2) <= found.joint).all())
    own = logit_bound(Q * gain, K * gain, heads=2)
    torch.testing.assert_close(found.joint, own.joint)
    torch.testing.assert_close(found.product, own.product)
    assert bool((found.product <= logit_bound(Q, K, heads=2, radius=4 * float(gain.max())).product).all())


def test_rotary_embeddings_respect_the_product_and_may_break_the_joint_bound():
    # Keys read by the second row only: at one position no logit, after a quarter turn the largest there is.
    Q, K = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    found = logit_bound(Q, K, radius=1.0, scale=1.0)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    logit = (turn @ Q @ torch.tensor([1.0, 0.0])) @ (K @ torch.tensor([0.0, 1.0]))
    assert float(found.joint) == 0 < abs(float(logit)) <= float(found.product)


def test_qk_clip_halves_the_bounds_with_the_logits():
    Q, K = torch.randn(8, 16), torch.randn(8, 16)
    before = logit_bound(Q, K, heads=2)
    schatten.qk_clip_(Q, K, torch.tensor([200.0, 50.0]), threshold=100.0)
    after = logit_bound(Q, K, heads=2)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * torch.tensor([0.5, 1.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must divide the rows of query"),
        ({"heads": 4, "key_heads": 3}, "key_heads=3, a divisor of it"),
        ({"heads": 2, "key_heads": 1}, "of one head_dim"),
        ({"gain": torch.ones(3)}, r"gain must have shape \(6,\)"),
        ({"query_bias": torch.ones(3)}, r"query_bias must have shape \(8,\)"),
        ({"key": torch.ones(8, 5)}, "of one fan_in"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        logit_bound(**{"query": torch.ones(8, 6), "key": torch.ones(8, 6), **change})


def test_a_head_that_is_not_finite_is_nan_and_its_neighbours_are_not():
    Q, K = torch.randn(8, 6), torch.randn(8, 6)
    Q[0, 0] = math.nan
    for bound in logit_bound(Q, K, heads=2):
        assert bound.isnan().tolist() == [True, False]
