"""Measures of gradients, updates and spectra obey their laws; quantities return what they announce and change nothing."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schatten
from schatten.diagnostics.alignment import Alignment, alignment, cosine
from schatten.diagnostics.conditioning import Condition, condition_number, conditioning, numerical_rank
from schatten.diagnostics.core import Block, Quantity
from schatten.diagnostics.effective_ranks import effective_rank, nuclear_ratio, stable_rank
from schatten.diagnostics.gradient import Gradient
from schatten.diagnostics.momentum import Momentum
from schatten.diagnostics.nuclear_norm import nuclear_norm
from schatten.diagnostics.singular_values import singular_values
from schatten.diagnostics.spectrum import Spectrum, by_part, histogram, log_edges, spectrum
from schatten.diagnostics.update import Update, rms_ratio, spectral_ratio, update_rms
from tests.contracts import measure_laws as laws

RANKS = [nuclear_ratio, stable_rank, effective_rank]
# The threshold of fp64, so that products with rotations count as many singular values.
OF_ONE = [*RANKS, partial(condition_number, rtol=1e-10), partial(numerical_rank, rtol=1e-10)]
PAIRED = [alignment, cosine, rms_ratio, spectral_ratio]


def name(of):
    return getattr(of, "__name__", None) or of.func.__name__


@pytest.mark.parametrize("measure", OF_ONE, ids=name)
@pytest.mark.parametrize(
    "law",
    [
        laws.scale_is_not_seen,
        laws.rotations_and_transposition_are_not_seen,
        laws.non_finite_stays_in_its_matrix,
        laws.any_batch_will_do,
    ],
    ids=name,
)
def test_a_measure_of_the_spectrum_obeys(law, measure):
    law(measure)


@pytest.mark.parametrize("measure", [*RANKS, partial(numerical_rank, rtol=1e-10)], ids=name)
def test_a_rank_is_0_of_zero_and_otherwise_between_1_and_the_rank(measure):
    laws.zero_has(measure, 0.0)
    if measure in RANKS:
        laws.lies_between_one_and_the_rank(measure)


@pytest.mark.parametrize("measure", [*RANKS, update_rms, nuclear_norm], ids=name)
def test_half_precision_is_measured_in_fp64(measure):
    # The cheap nuclear norm's polar factor is computed in fp32 either way.
    laws.half_precision_is_taken_for_its_value(measure)


@pytest.mark.parametrize("measure", [update_rms, nuclear_norm], ids=name)
def test_a_norm_carries_scale_keeps_non_finite_matrices_apart_and_is_0_of_zero(measure):
    laws.non_finite_stays_in_its_matrix(measure)
    laws.any_batch_will_do(measure)
    laws.zero_has(measure, 0.0)
    if measure is update_rms:
        laws.scale_carries_over(measure)
        laws.rotations_and_transposition_are_not_seen(measure)


@pytest.mark.parametrize("measure", PAIRED, ids=name)
def test_a_measure_of_two_matrices_does_not_see_common_rotations_or_transposition(measure):
    A, B = laws.matrix(2, 5, 4, seed=1), laws.matrix(2, 5, 4, seed=2)
    U, V = laws.rotation(5, 3), laws.rotation(4, 4)
    for first, second in ((U @ A @ V, U @ B @ V), (A.mT, B.mT)):
        torch.testing.assert_close(measure(first, second), measure(A, B), **laws.CLOSE)
    laws.any_batch_will_do(lambda X: measure(X, X.flip(-1)))
    laws.non_finite_stays_in_its_matrix(lambda X: measure(X, torch.ones_like(X)))
    laws.non_finite_stays_in_its_matrix(lambda X: measure(torch.ones_like(X), X))


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 6), st.floats(-30, 30), st.floats(-30, 30))
@settings(max_examples=40, deadline=None)
def test_alignment_and_cosine_lie_between_minus_1_and_1_and_see_no_scale(seed, m, n, a, b):
    G, D = laws.matrix(m, n, seed=seed), laws.matrix(m, n, seed=seed + 1)
    for measure in (alignment, cosine):
        value = float(measure(G, D))
        assert abs(value) <= 1 + 1e-12
        assert float(measure(10**a * G, -(10**b) * D)) == pytest.approx(-value, abs=1e-10)


@pytest.mark.parametrize("measure", [alignment, cosine], ids=name)
def test_a_zero_matrix_is_aligned_with_nothing(measure):
    X, zero = laws.matrix(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    assert float(measure(X, zero)) == float(measure(zero, X)) == float(measure(zero, zero)) == 0


def test_matrices_of_different_shapes_have_no_alignment():
    with pytest.raises(ValueError, match=r"matrices of one shape, got \(3, 4\) and \(4, 3\)"):
        alignment(torch.ones(3, 4), torch.ones(4, 3))


@pytest.mark.parametrize("ratio", [rms_ratio, spectral_ratio], ids=name)
def test_the_share_of_a_weight_is_0_of_no_update_and_infinite_of_a_zero_weight(ratio):
    X, zero = laws.matrix(3, 4), torch.zeros(3, 4)
    assert float(ratio(zero, X)) == float(ratio(zero, zero)) == 0
    assert float(ratio(X, zero)) == math.inf


@pytest.mark.parametrize("measure", [*RANKS, condition_number, spectrum, update_rms, nuclear_norm], ids=name)
def test_what_is_no_real_matrix_is_refused(measure):
    with pytest.raises(ValueError, match=r"must be a matrix or a batch"):
        measure(torch.ones(3))
    with pytest.raises(TypeError, match="real floating point"):
        measure(torch.ones(3, 3, dtype=torch.complex64))


def test_a_zero_matrix_has_no_condition_number_and_a_rank_deficient_one_that_of_its_range():
    laws.zero_has(condition_number, math.nan)
    S = torch.diag(torch.tensor([8.0, 2.0, 1e-8, 0.0], dtype=torch.float64))
    assert float(numerical_rank(S.float())) == 2
    assert float(condition_number(S.float())) == pytest.approx(4)
    # 1e-8 of the largest is far above fp64's rounding.
    assert float(numerical_rank(S)) == 3
    # Half precision is taken for its exact value: 1e-3 is less than bf16's eps, 2^-7, and counts.
    assert float(numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 1e-9])).bfloat16())) == 2
    assert float(condition_number(S, rtol=0.5)) == pytest.approx(1)
    with pytest.raises(ValueError, match="rtol must be a share"):
        numerical_rank(S, rtol=1.0)


def test_conditioning_of_a_batch_is_that_of_each_matrix():
    S = laws.matrix(3, 5, 4)
    K = schatten.maps.Power(0.5, solver=schatten.solvers.svd())
    for found, own in zip(conditioning(K, S), zip(*(conditioning(K, X) for X in S), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(own), **laws.CLOSE)


def test_a_spectrum_is_descending_and_empty_for_no_rows():
    s = spectrum(laws.matrix(4, 3, 6))
    assert s.shape == (4, 3) and bool((s.diff(dim=-1) <= 0).all())
    assert spectrum(torch.zeros(2, 0, 3)).shape == (2, 0)
    assert singular_values(torch.zeros(0, 2, 3)).shape == (0, 2)
    with pytest.raises(ValueError, match=r"float64 or torch\.float32"):
        spectrum(torch.eye(2), dtype=torch.bfloat16)


def test_histograms_count_every_value_once_and_outsiders_at_the_ends():
    edges = log_edges(1e-2, 1e2, 4)
    values = torch.tensor([[1e-9, 0.01, 0.05, 0.1, 1.0, 99.0, 100.0, 1e9]])
    assert histogram(values, edges).tolist() == [[3, 1, 1, 3]]
    assert histogram(torch.tensor([[1.0], [math.nan]]), edges).isnan().all(-1).tolist() == [False, True]
    assert histogram(torch.zeros(2, 0), edges).tolist() == [[0] * 4] * 2
    assert histogram(torch.tensor([0.5]), torch.tensor([0.0, 1.0])).tolist() == [1]
    with pytest.raises(ValueError, match="at least two ascending numbers"):
        histogram(values, edges[:1])


@pytest.mark.parametrize(("lowest", "highest", "bins"), [(0, 1, 4), (1, 1, 4), (1, math.inf, 4), (1, 2, 0)])
def test_edges_that_make_no_bins_are_refused(lowest, highest, bins):
    with pytest.raises(ValueError, match="0 < lowest < highest < inf"):
        log_edges(lowest, highest, bins)
    with pytest.raises(ValueError, match="0 < lowest < highest < inf"):
        Spectrum(bins=bins, momentum=(lowest, highest))


def test_blocks_of_a_fused_projection_are_named_by_the_order_of_its_layout():
    W = torch.arange(12.0).reshape(12, 1).expand(12, 2)
    (piece,) = schatten.layout.pieces(schatten.Layout(split=3, heads=2), (12, 2))
    found = by_part(piece.of(W), ("q", "k", "v"))
    assert {part: blocks[..., 0].flatten().tolist() for part, blocks in found.items()} == {
        "q": [0, 1, 2, 3],
        "k": [4, 5, 6, 7],
        "v": [8, 9, 10, 11],
    }
    with pytest.raises(ValueError, match="names must divide the blocks"):
        by_part(piece.of(W), ("q", "k", "v", "z"))


QUANTITIES = [
    Gradient(),
    Gradient(exact=True),
    Momentum(),
    Momentum(exact=True),
    Alignment(),
    Update(),
    Condition(),
    Spectrum(),
]


TENSORS = ("weight", "gradient", "momentum", "update")


def block(**changed):
    made = {key: laws.matrix(3, 6, 4, seed=i).float() for i, key in enumerate(TENSORS)}
    return Block("w", schatten.Rule(), {}, **{**made, **changed})


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
def test_a_quantity_returns_its_columns_for_each_block_and_changes_nothing(quantity):
    of = block()
    before = [t.clone() for t in (of.weight, of.gradient, of.momentum, of.update)]
    found = quantity(of)
    assert isinstance(quantity, Quantity)
    optional = {"effective_rank"} if "exact" in repr(quantity) and not quantity.exact else set()
    assert set(found) == set(quantity.columns) - optional
    for column, value in found.items():
        assert value.shape[0] == 3 and value.dtype == torch.float64
        assert value.ndim == (2 if column.endswith("histogram") else 1)
        assert bool(value.isfinite().all())
    for old, new in zip(before, (of.weight, of.gradient, of.momentum, of.update), strict=True):
        assert torch.equal(old, new)
    # Each block's numbers are its own.
    alone = quantity(block(**{k: getattr(of, k)[1:2] for k in TENSORS}))
    for column, value in alone.items():
        torch.testing.assert_close(value[0], found[column][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
def test_a_quantity_of_what_is_not_finite_is_nan_and_of_zero_a_number(quantity):
    for value in (math.nan, math.inf):
        found = quantity(block(**{key: torch.full((2, 3, 4), value) for key in TENSORS}))
        assert all(bool(column.isnan().all()) for column in found.values()), found
    found = quantity(block(**{key: torch.zeros(2, 3, 4) for key in TENSORS}))
    # A zero matrix has no condition number.
    assert all(bool(column.isfinite().all()) for column in found.values()) != (quantity.name == "conditioning")


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
def test_a_rule_without_momentum_has_no_columns_of_momentum(quantity):
    found = quantity(block(momentum=None))
    assert not [column for column in found if "momentum" in column]


def test_a_rule_without_a_convex_map_has_the_momentums_condition_number_alone():
    rule = next(rule for preset in schatten.presets.__all__ if not isinstance((rule := rule_of(preset)).map, schatten.maps.Map))
    of = Block("w", rule, {}, laws.matrix(1, 3, 4), momentum=laws.matrix(1, 3, 4))
    assert list(Condition()(of)) == ["momentum"]


def rule_of(preset):
    opt = getattr(schatten.presets, preset)([torch.nn.Parameter(torch.eye(2))])
    return opt.rule(opt.param_groups[0])


@pytest.mark.parametrize("quantity", QUANTITIES, ids=repr)
def test_a_quantity_stays_on_its_device_and_asks_it_for_no_number(quantity):
    # A meta tensor has no numbers to ask for, and mixes with no tensor of the CPU but with single numbers.
    rule = schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.polynomial(dtype="float32")))
    of = Block("w", rule, {}, **{key: torch.empty(3, 6, 4, device="meta") for key in TENSORS})
    assert {value.device.type for value in quantity(of).values()} == {"meta"}
