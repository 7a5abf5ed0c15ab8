"""Whole solvers on Triton's products keep the accuracy that their docstrings state: halves that are mirrored endanger none."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from schatten import kernels, solvers
from schatten.kernels.triton import product, product_tiles
from schatten.kernels.triton.product_tiles import Tiles
from schatten.solvers.power_function import PowerFunction
from tests.contracts.matrices import read, spectral_norm, with_spectrum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOG = torch.logspace(0, -3, 40)

# Two tiles by two; spectra on which an iteration has failed.
HARD = torch.stack(
    [
        with_spectrum(40, 60, LOG),
        with_spectrum(40, 60, 1e30 * torch.tensor([3.0, 1.0, 0.05, 0.03]).repeat_interleave(10), seed=2),
    ]
).float()


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """How often the kernel was launched, in long tiles, which take the interpreter less time."""
    monkeypatch.setattr(product_tiles, "INTERPRETED", Tiles(32, 32, 128, 4, 1))
    product._planned.cache_clear()
    count, launch = [0], product._launch

    def counted(*args, **kwargs):
        count[0] += 1
        return launch(*args, **kwargs)

    monkeypatch.setattr(product, "_launch", counted)
    yield count
    product._planned.cache_clear()
    assert count[0] > 0


def on_triton(solver, X: Tensor, *args) -> Tensor:
    with kernels.use("triton"):
        return (solver.apply if args else solver)(X.to(DEVICE), *args).cpu()


def band(solver, dtype: str) -> float:
    """What the docstring states: fp16 may take quintics with more room, which keep what was asked for."""
    return solver.tol if dtype == "float16" else solver.error


@pytest.mark.parametrize(
    ("dtype", "widening", "tall"),
    [("bfloat16", 0.015, False), ("bfloat16", 0.015, True), ("float16", 0.001, True), ("float32", 1e-5, False)],
)
def test_the_polynomial_keeps_its_band(dtype, widening, tall):
    X, solver = HARD.mT if tall else HARD, solvers.polynomial(dtype=dtype)
    for G, P in zip(X, on_triton(solver, X), strict=True):
        assert (read(G, P).above(1e-2).gain - 1).abs().max() <= band(solver, dtype) + widening


@pytest.mark.parametrize(("dtype", "widening"), [("bfloat16", 0.03), ("float16", 0.001), ("float32", 1e-5)])
def test_the_gram_form_keeps_its_band(dtype, widening):
    # Over three decades it diverges where a product is off.
    G, solver = with_spectrum(40, 120, LOG).float(), solvers.gram(dtype=dtype)
    assert (read(G, on_triton(solver, G)).above(1e-2).gain - 1).abs().max() <= band(solver, dtype) + widening


def test_a_tight_band_in_fp32_is_kept():
    G = with_spectrum(40, 60, LOG).float()
    above = read(G, on_triton(solvers.polynomial(tol=1e-3, dtype="float32"), G)).above(1e-3)
    assert (above.gain - 1).abs().max() <= 1e-3 + 1e-5


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_the_tower_is_within_two_percent_of_a_power(dtype, rounding):
    S = with_spectrum(40, 60, LOG).float()
    gain = read(S, on_triton(solvers.tower(dtype=dtype), S, PowerFunction(0.5))).gain
    assert ((gain - LOG**0.5).abs() <= 0.02 * LOG**0.5 + rounding).all()


@pytest.mark.parametrize("p", [0.5, -0.5])
def test_the_coupled_iteration_is_within_1e_4_of_a_power(p):
    sigma = torch.logspace(0, -3, 33)
    S = with_spectrum(33, 50, sigma).float()
    gain = read(S, on_triton(solvers.coupled_minimax(), S, PowerFunction(p))).gain
    assert (gain / sigma.double() ** p - 1).abs().max() < 1e-4


ITERATIONS = {
    "newton_schulz": lambda dtype: solvers.newton_schulz(dtype=dtype),
    "muon_p 1/2": lambda dtype: solvers.muon_p("1/2", dtype=dtype),
    "muon_p 1/3": lambda dtype: solvers.muon_p("1/3", dtype=dtype),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("newton_schulz", "bfloat16"),
        ("newton_schulz", "float32"),
        ("muon_p 1/2", "float16"),
        ("muon_p 1/2", "float32"),
        ("muon_p 1/3", "bfloat16"),
    ],
)
def test_published_iterations_come_as_near_to_their_fp64_results_as_in_eager_torch(name, dtype):
    X = with_spectrum(33, 40, torch.logspace(0, -2, 33)).float().unsqueeze(0)
    solver = ITERATIONS[name](dtype)
    with kernels.use("eager"):
        exact, eager = ITERATIONS[name]("float64")(X.double()), solver(X)
    found = on_triton(solver, X)
    # Rounding falls differently, not worse: half as much again, and what six steps of fp32 leave in any case.
    allowed = 1.5 * max(spectral_norm(e) for e in eager.double() - exact) + 64 * 2.0**-24
    assert max(spectral_norm(e) for e in found.double() - exact) <= allowed


def test_coupled_newton_does_not_drift_apart():
    sigma = torch.logspace(0, -2, 33)
    S, solver = with_spectrum(33, 40, sigma).float(), solvers.coupled_newton()
    with kernels.use("eager"):
        eager = solver.apply(S, PowerFunction(0.5))
    assert spectral_norm(on_triton(solver, S, PowerFunction(0.5)).double() - eager.double()) < 1e-4


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_gradient_that_is_not_finite_spoils_its_matrix_only():
    X, solver = HARD[[0, 1, 0], :35, :40], solvers.polynomial(steps=2, dtype="bfloat16")
    clean = on_triton(solver, X)
    X[1, 3, 5] = torch.nan
    spoiled = on_triton(solver, X)
    assert torch.equal(spoiled[::2], clean[::2])
    assert not spoiled[1].isfinite().any()
