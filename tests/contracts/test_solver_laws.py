"""Every solver of the folder obeys every law of `solver_laws`, in fp32; those that do not need fp32 also in half precision."""

import copy
import pickle

import pytest
import torch

from schatten import solvers
from tests.contracts import solver_laws
from tests.contracts.solver_laws import LAWS, build, builders

BUILDERS = builders()

# Exact statements and bounds, true in any working precision.
IN_HALF_PRECISION = (
    solver_laws.zero_gives_zero,
    solver_laws.empty_stays_empty,
    solver_laws.input_is_only_read,
    solver_laws.output_has_the_dtype_of_the_input,
    solver_laws.equal_calls_are_bitwise_equal,
    solver_laws.half_precision_stays_bounded,
    solver_laws.no_state_of_torch_changes,
)


def test_the_listing_finds_the_solvers():
    assert {builder.__name__ for builder in BUILDERS} >= {"svd", "polynomial", "newton_schulz"}


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_in_fp32(law, builder):
    law(build(builder, "float32"))


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("law", IN_HALF_PRECISION, ids=lambda law: law.__name__)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_in_half_precision(law, builder, dtype):
    law(build(builder, dtype))


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_a_power_of_two_changes_no_bit_of_the_result(builder, dtype):
    # Scaling by 2^k is exact, so the normalised matrix is the same and every bit after it, in any precision. The SVD is
    # LAPACK's, which may scale on its own: fp64 rounding, below fp32's.
    solver, X = build(builder, dtype), solver_laws.gaussian(20, 30).float()
    for k in (-90, -7, 1, 90):
        solver_laws.close(solver(X * 2.0**k), solver(X), 1e-7 if builder is solvers.svd else 0.0, f"2^{k}")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float16, torch.float64])
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_repr_is_the_solver(builder, dtype):
    solver = build(builder, dtype)
    assert eval(repr(solver), vars(solvers)) == solver
    assert "torch." not in repr(solver)


@pytest.mark.parametrize(
    "options",
    [{"tol": 1e-3}, {"tol": 0.123456789}, {"steps": 3}, {"steps": 6, "lower": 1e-4}, {"tol": 0.05, "lower": 0.0123456789}],
)
def test_repr_is_the_polynomial_with_these_options(options):
    solver = solvers.polynomial(**options)
    assert eval(repr(solver), vars(solvers)) == solver


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_solvers_are_values(builder):
    solver = builder()
    twins = (builder(), pickle.loads(pickle.dumps(solver)), copy.deepcopy(solver))
    for twin in twins:
        assert twin == solver and hash(twin) == hash(solver) and repr(twin) == repr(solver)
    assert isinstance(solver, solvers.Solver)
    with pytest.raises(AttributeError):
        solver.steps = 3


def test_different_solvers_differ():
    different = [
        solvers.svd(),
        solvers.polynomial(),
        solvers.polynomial(steps=7),
        solvers.polynomial(lower=1e-4),
        solvers.polynomial(dtype="float32"),
        solvers.newton_schulz(),
        solvers.newton_schulz(steps=6),
        solvers.newton_schulz(dtype="float32"),
    ]
    assert len(set(different)) == len(different)
    assert len({repr(solver) for solver in different}) == len(different)
    assert solvers.polynomial(dtype=torch.float32) == solvers.polynomial(dtype="float32")


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
@pytest.mark.parametrize(
    ("X", "error", "text"),
    [
        (torch.zeros(3), ValueError, r"X must be a matrix or a batch \(\*b, m, n\), got shape \(3,\)"),
        (torch.zeros(()), ValueError, r"got shape \(\)"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "X must be real floating point, got torch.complex64"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.bool), TypeError, "got torch.bool"),
        ([[1.0]], TypeError, "X must be a torch.Tensor, got list"),
    ],
    ids=["vector", "scalar", "complex", "integer", "bool", "list"],
)
def test_what_has_no_polar_factor_is_refused(builder, X, error, text):
    with pytest.raises(error, match=text):
        builder()(X)


@pytest.mark.parametrize(
    ("builder", "options", "text"),
    [
        ("polynomial", {"tol": 0.0}, r"tol must lie in \(0, 1\), got 0.0"),
        ("polynomial", {"tol": 1.0}, r"tol must lie in \(0, 1\), got 1.0"),
        ("polynomial", {"tol": -0.1}, r"tol must lie in \(0, 1\), got -0.1"),
        ("polynomial", {"tol": float("nan")}, r"tol must lie in \(0, 1\), got nan"),
        ("polynomial", {"tol": 1e-18}, r"tol must be reachable in double precision.* got tol=1e-18"),
        ("polynomial", {"tol": 0.1, "steps": 3}, "give one, got tol=0.1 and steps=3"),
        ("polynomial", {"steps": 0}, "steps must be at least 1, got 0"),
        ("polynomial", {"steps": 2.5}, "steps must be .*got 2.5"),
        ("polynomial", {"lower": 0.0}, r"lower must lie in \(0, 1\), got 0.0"),
        ("polynomial", {"lower": 1.0}, r"lower must lie in \(0, 1\), got 1.0"),
        ("polynomial", {"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16 or 'auto', got 'int8'"),
        ("polynomial", {"dtype": torch.int32}, "or 'auto', got torch.int32"),
        ("newton_schulz", {"steps": 0}, "steps must be at least 1, got 0"),
        ("newton_schulz", {"steps": 2.5}, "steps must be .*got 2.5"),
        ("newton_schulz", {"dtype": "half"}, "dtype must be one of .*, got 'half'"),
    ],
)
def test_an_option_out_of_range_is_refused_at_construction(builder, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        getattr(solvers, builder)(**options)


def test_options_are_keywords_only():
    for builder in (solvers.polynomial, solvers.newton_schulz):
        with pytest.raises(TypeError):
            builder(5)
