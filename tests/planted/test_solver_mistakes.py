"""Broken solvers: each mistake, found in a published library, is caught by the laws named beside it (reference/peers.md)."""

from functools import partial

import pytest
import torch

from schatten.solvers import polynomial, svd
from schatten.solvers.core import on_wide_batch
from schatten.solvers.iteration import product_form
from schatten.solvers.minimax import composition
from tests.contracts import solver_laws as laws

SCHEDULE, _ = composition(1e-3, 7, margin=1.01)

# Emerging-Optimizers and older flash-newton-schulz: the first quintic is negative for sigma > 0.8837.
AOL_A = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)


def iterate(X, schedule=SCHEDULE, *, eps=0.0, work=torch.float32, norm_in=torch.float32, in_place=False, whole_batch=False):
    """A textbook Newton-Schulz with the switches by which libraries got it wrong."""

    def run(Y):
        Y = Y if in_place and Y.dtype == norm_in else Y.to(norm_in, copy=True)
        dims = (0, 1, 2) if whole_batch else (1, 2)
        norm = torch.linalg.vector_norm(Y, dim=dims, keepdim=True) + eps
        Y.div_(torch.where(norm == 0, 1, norm))
        return product_form(Y.to(work), schedule)

    return on_wide_batch(X, run)


def untransposed(X):
    """Reads the last two dimensions the wrong way round on return."""
    return polynomial(dtype="float32")(X.mT).reshape(X.shape) if X.numel() else X.clone()


def across_the_batch(X):
    """Flattens a stack into one matrix, as `X.flatten(0, -2)` does."""
    return polynomial(dtype="float32")(X.flatten(0, -2)).view(X.shape) if X.numel() else X.clone()


def spreading(X):
    """Divides by the largest entry of the whole batch: one nan reaches every matrix."""
    return polynomial(dtype="float32")(X / X.abs().amax().clamp_min(1e-38)) if X.numel() else X.clone()


def hiding(X):
    """nan_to_num: a bad gradient becomes a finite direction."""
    return polynomial(dtype="float32")(X.nan_to_num(posinf=0.0, neginf=0.0))


def stochastic(X):
    return polynomial(dtype="float32")(X) + 1e-6 * torch.randn_like(X)


def flipping_a_switch(X):
    torch.set_float32_matmul_precision("medium")
    return polynomial(dtype="float32")(X)


def in_fp32_only(X):
    return polynomial(dtype="float32")(X.float())


def contiguous_only(X):
    return svd()(torch.as_strided(X, X.shape, torch.empty(X.shape).stride())) if X.numel() else X.clone()


def cut_by_eps_of_the_input(X):
    """svd() with a rank cut of max(m, n) * eps of a bf16 input: everything of a 128-wide matrix counts as zero."""
    U, s, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    kept = s > max(X.shape[-2:]) * torch.finfo(X.dtype).eps * s[..., :1]
    return ((U * kept.double().unsqueeze(-2)) @ Vh).to(X.dtype)


MISTAKES = {
    "AOL table A flips the sign of the top direction": (partial(iterate, schedule=AOL_A), [laws.no_direction_ascends]),
    "Polar Express without a margin overflows in bf16": (
        partial(iterate, schedule=composition(1e-3, 5)[0], work=torch.bfloat16),
        [laws.half_precision_stays_bounded],
    ),
    "an absolute eps in the norm": (partial(iterate, eps=1e-7), [laws.scale_of_the_input_does_not_matter]),
    "a norm whose square overflows": (
        iterate,
        [laws.scale_of_the_input_does_not_matter, laws.scale_of_each_matrix_of_a_batch_does_not_matter],
    ),
    "a cast to fp16 before the norm": (partial(iterate, norm_in=torch.float16), [laws.scale_of_the_input_does_not_matter]),
    "normalising in place": (partial(iterate, in_place=True), [laws.input_is_only_read]),
    "one norm for the whole batch": (partial(iterate, whole_batch=True), [laws.a_batch_is_its_matrices]),
    "a stack read as one matrix": (across_the_batch, [laws.a_batch_is_its_matrices]),
    "a reshape for a transpose": (untransposed, [laws.transposing_commutes, laws.no_direction_ascends]),
    "nan spreads through the batch": (spreading, [laws.a_non_finite_matrix_spreads_nowhere_and_shows]),
    "nan is hidden": (hiding, [laws.a_non_finite_matrix_spreads_nowhere_and_shows]),
    "noise in the result": (stochastic, [laws.equal_calls_are_bitwise_equal, laws.zero_gives_zero]),
    "a global switch": (
        flipping_a_switch,
        [laws.no_state_of_torch_changes, laws.matmul_precision_is_the_processs_own_and_bounds_the_loss],
    ),
    "fp32 results for every input": (in_fp32_only, [laws.output_has_the_dtype_of_the_input]),
    "strides ignored": (contiguous_only, [laws.strides_do_not_matter]),
    "a rank cut by the eps of a half-precision input": (
        cut_by_eps_of_the_input,
        [laws.a_half_precision_input_counts_as_its_exact_value],
    ),
    "no schedule at all": (lambda X: X.clone(), [laws.vectors_are_normalised, laws.scale_of_the_input_does_not_matter]),
    "the input itself": (lambda X: X, [laws.empty_stays_empty, laws.input_is_only_read]),
}


@pytest.mark.parametrize(
    ("solver", "law"),
    [pytest.param(s, law, id=f"{name}-{law.__name__}") for name, (s, caught) in MISTAKES.items() for law in caught],
)
def test_the_mistake_is_caught_by_the_law(solver, law):
    before = torch.get_float32_matmul_precision()
    try:
        with pytest.raises(AssertionError):
            law(solver)
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_law_catches_something():
    assert {law for _, caught in MISTAKES.values() for law in caught} == set(laws.LAWS)


def test_a_gaussian_matrix_does_not_show_the_flipped_sign():
    # Why the zoo has near-rank-one and power-law spectra: on a Gaussian, table A looks right.
    G = laws.gaussian(64, 96)
    reading = laws.read(G, iterate(G, AOL_A, norm_in=torch.float64, work=torch.float64)).above(1e-2)
    assert reading.gain.min() > 0.9
