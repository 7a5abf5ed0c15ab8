"""The laws of a solver, one function each: `law(solver)` returns if it holds and raises AssertionError if not.

`test_solver_laws.py` applies them to every solver found in the folder, `planted/` to broken ones they must catch. Laws
say what every polar-factor solver owes its caller; how close the result is to U V^T is `test_polar_accuracy.py`.
"""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from schatten import solvers
from tests.contracts.matrices import ZOO, gaussian, read, spectral_norm

Solver = Callable[[Tensor], Tensor]

# Wide, so well conditioned, and large enough for solvers that treat large matrices one at a time.
LARGE = (66, 1000)

SHAPES = ((24, 40), (40, 24), (16, 16), (1, 7), (7, 1), (1, 1))

# Well-conditioned inputs of a few dozen rows: fp32 rounding, 6e-8 per entry, times a gain of at most 1e2 at their
# smallest singular value, or the slope of the default quintics at sigma = 1, 244. Half precision is compared bit for bit
# or not at all.
FP32 = 5e-5


def builders() -> list[Callable[..., Solver]]:
    """Every function of `schatten.solvers` that builds a solver of the polar factor, found by its listing."""
    functions = [f for name in solvers.__all__ if inspect.isfunction(f := getattr(solvers, name))]
    no_arguments = [f for f in functions if all(p.default is not p.empty for p in inspect.signature(f).parameters.values())]
    return [f for f in no_arguments if isinstance(f(), solvers.Solver)]


def build(builder: Callable[..., Solver], dtype: str) -> Solver:
    """A solver with its defaults, multiplying in `dtype` if it lets the caller choose."""
    return builder(dtype=dtype) if "dtype" in inspect.signature(builder).parameters else builder()


def close(A: Tensor, B: Tensor, tolerance: float, what: str) -> None:
    """Equal up to `tolerance` in every entry; nan and inf are never close."""
    assert A.shape == B.shape, f"{what}: shape {tuple(A.shape)} against {tuple(B.shape)}"
    error = (A.double() - B.double()).abs().amax() if A.numel() else torch.zeros(())
    assert error <= tolerance, f"{what}: off by {float(error):.3g}, allowed {tolerance:g}"


def matrices() -> Iterator[Tensor]:
    """fp32 Gaussians of every orientation."""
    for seed, (m, n) in enumerate(SHAPES):
        yield gaussian(m, n, seed=seed).float()


def scale_of_the_input_does_not_matter(solver: Solver) -> None:
    for X in matrices():
        P = solver(X)
        for scale in (1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30):
            close(solver(X * scale), P, FP32, f"{tuple(X.shape)} times {scale:g}")


def scale_of_each_matrix_of_a_batch_does_not_matter(solver: Solver) -> None:
    X = gaussian(3, 12, 20).float()
    scales = torch.tensor([1e-30, 1.0, 1e30]).view(3, 1, 1)
    close(solver(X * scales), solver(X), FP32, "batch of scales 1e-30, 1, 1e30")


def zero_gives_zero(solver: Solver) -> None:
    for m, n in SHAPES:
        assert solver(torch.zeros(m, n)).count_nonzero() == 0
    X = gaussian(3, 8, 5).float()
    X[1] = 0
    P = solver(X)
    assert P[1].count_nonzero() == 0, "a zero matrix in a batch"
    close(P[0], solver(X[0]), FP32, "its neighbour")


def a_batch_is_its_matrices(solver: Solver) -> None:
    for m, n in (*SHAPES, LARGE):
        X = gaussian(2, 3, m, n, seed=m).float()
        singles = torch.stack([torch.stack([solver(x) for x in row]) for row in X])
        close(solver(X), singles, FP32, f"2 x 3 matrices {m} x {n}")
        close(solver(X[0]), singles[0], FP32, f"3 matrices {m} x {n}")
        close(solver(X.view(1, 2, 1, 3, m, n)), singles.view(1, 2, 1, 3, m, n), FP32, f"1 x 2 x 1 x 3 matrices {m} x {n}")


def transposing_commutes(solver: Solver) -> None:
    for X in matrices():
        close(solver(X.mT), solver(X).mT, FP32, f"transpose of {tuple(X.shape)}")


def vectors_are_normalised(solver: Solver) -> None:
    # One row, one column and one entry have the polar factor X / ||X||; Keller's schedule leaves it at 0.7 to 1.13.
    for shape in ((1, 7), (7, 1), (1, 1)):
        X = gaussian(*shape, seed=3).float()
        P = solver(X)
        gain = float((P * X).sum() / X.norm())
        assert 0.68 < gain < 1.17, f"{shape}: gain {gain}"
        close(P, gain * X / X.norm(), FP32, f"{shape} keeps its direction")


def empty_stays_empty(solver: Solver) -> None:
    for shape in ((0, 5), (5, 0), (0, 0), (3, 0, 4), (0, 4, 4), (2, 0, 3, 4)):
        X = torch.zeros(shape)
        P = solver(X)
        assert P.shape == X.shape and P is not X, shape


def input_is_only_read(solver: Solver) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for X in (
            gaussian(6, 9).to(dtype),
            gaussian(9, 6).to(dtype),
            gaussian(2, 5, 5).to(dtype),
            torch.ones(4, 4, dtype=dtype),
        ):
            before, version = X.clone(), X._version
            P = solver(X)
            assert torch.equal(X, before) and X._version == version, f"{dtype} {tuple(X.shape)} was written to"
            assert P.untyped_storage().data_ptr() != X.untyped_storage().data_ptr(), (
                f"{dtype}: the output is the input's memory"
            )


def a_non_finite_matrix_spreads_nowhere_and_shows(solver: Solver) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for m, n in ((6, 9), (9, 6), (1, 4), (1, 1), LARGE):
            X = gaussian(4, m, n, seed=n).float()
            clean = solver(X)
            X[2, -1, 0] = bad
            P = solver(X)
            assert not P[2].isfinite().all(), f"{bad} in {m} x {n} came out finite"
            others = [0, 1, 3]
            close(P[others], clean[others], FP32, f"the neighbours of {bad}")


def output_has_the_dtype_of_the_input(solver: Solver) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert solver(gaussian(5, 7).to(dtype)).dtype == dtype


def a_half_precision_input_counts_as_its_exact_value(solver: Solver) -> None:
    # The widest has max(m, n) * eps > 1 in either half precision: a cut relative to the input's eps would drop it all.
    for dtype in (torch.float16, torch.bfloat16):
        for m, n in ((12, 20), (20, 12), (4, 1100)):
            X = gaussian(m, n, seed=5).to(dtype)
            # One rounding of entries below 1.2: half a unit in the last place.
            close(solver(X), solver(X.float()), 1.2 * torch.finfo(dtype).eps, f"{dtype} {m} x {n}")


def strides_do_not_matter(solver: Solver) -> None:
    X = gaussian(6, 10, 8).float()
    wide = X[:, ::2, 1::3]
    broadcast = X[:1].expand(3, 10, 8)
    for view in (X.mT, wide, wide.mT, X.permute(1, 2, 0), X.flip(0), broadcast):
        close(solver(view), solver(view.contiguous()), FP32, f"strides {view.stride()}")


def matmul_precision_is_the_processs_own_and_bounds_the_loss(solver: Solver) -> None:
    # 64 x 96: below some size CPUs do not bother to switch.
    X = gaussian(64, 96).float()
    before = torch.get_float32_matmul_precision()
    results = {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            results[precision] = solver(X)
            assert torch.get_float32_matmul_precision() == precision, "the solver changed the setting"
    finally:
        torch.set_float32_matmul_precision(before)
    # A process that lowers fp32's precision gets TF32's or bf16's rounding, about 2^-8 for each of 15 products, no more.
    for precision, P in results.items():
        close(P, results["highest"], 15 * 2**-8, f"matmul precision {precision!r}")


def equal_calls_are_bitwise_equal(solver: Solver) -> None:
    for X in matrices():
        assert torch.equal(solver(X), solver(X.clone()))


def no_state_of_torch_changes(solver: Solver) -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.random.get_rng_state().tolist(),
        )

    X, before = gaussian(6, 9).float(), state()
    P = solver(X)
    assert state() == before
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            close(solver(X), P, 0.0, f"under {context.__name__}")
    assert state() == before


def no_direction_ascends(solver: Solver) -> None:
    # <U_i V_i^T, P> > 0 for every singular direction that fp32 resolves: a step against it goes uphill.
    for name, G in ZOO.items():
        reading = read(G.float(), solver(G.float())).above(1e-3)
        assert reading.gain.min() > 0, f"{name}: gain {float(reading.gain.min()):.3g}"


def half_precision_stays_bounded(solver: Solver) -> None:
    # sigma = 1 is where a quintic has no room; 1.3 is above every band, below every overflow.
    for name, G in ZOO.items():
        P = solver(G.bfloat16())
        assert P.isfinite().all() and spectral_norm(P.double()) < 1.3, f"{name}: {spectral_norm(P.double()):.3g}"


LAWS: tuple[Callable[[Solver], None], ...] = (
    scale_of_the_input_does_not_matter,
    scale_of_each_matrix_of_a_batch_does_not_matter,
    zero_gives_zero,
    a_batch_is_its_matrices,
    transposing_commutes,
    vectors_are_normalised,
    empty_stays_empty,
    input_is_only_read,
    a_non_finite_matrix_spreads_nowhere_and_shows,
    output_has_the_dtype_of_the_input,
    a_half_precision_input_counts_as_its_exact_value,
    strides_do_not_matter,
    matmul_precision_is_the_processs_own_and_bounds_the_loss,
    equal_calls_are_bitwise_equal,
    no_state_of_torch_changes,
    no_direction_ascends,
    half_precision_stays_bounded,
)
