"""Every map of the folder obeys every law of `map_laws`."""

import dataclasses
import pickle

import pytest
import torch

from schatten import maps, solvers
from schatten.maps import Map
from schatten.maps.lifts import LIFTS, magnitudes
from schatten.maps.potential import Potential, Thresholded
from tests.contracts.map_laws import LAWS, SPECTRAL_LAWS, SYMMETRIC_LAWS, classes, exact, inner, instances, lift_of
from tests.contracts.matrices import ZOO, gaussian

MAPS = instances()
SPECTRAL = {name: K for name, K in MAPS.items() if lift_of(K) in ("spectrum", "matrix")}
SYMMETRIC = {name: K for name, K in MAPS.items() if lift_of(K) not in ("rows", "columns")}


def cases(found, laws):
    """Laws by maps, as one parameter list."""
    return [pytest.param(law, K, id=f"{name}-{law.__name__}") for name, K in found.items() for law in laws]


def test_the_listing_finds_the_maps():
    assert {"Nuclear", "Power", "Huber", "KyFan", "Sum"} <= {cls.__name__ for cls in classes()}
    # Twelve potentials on five lifts each and with other arguments on two, L1 on three lifts, Nuclear and Frobenius.
    assert len(MAPS) > 100 and len(SPECTRAL) > 40
    assert {lift_of(K) for K in MAPS.values()} == set(LIFTS)


@pytest.mark.parametrize(("law", "K"), [*cases(MAPS, LAWS), *cases(SPECTRAL, SPECTRAL_LAWS), *cases(SYMMETRIC, SYMMETRIC_LAWS)])
def test_map(law, K):
    law(K)


@pytest.mark.parametrize("cls", [cls for cls in classes() if "over" in {f.name for f in dataclasses.fields(cls)}])
def test_transposing_exchanges_rows_and_columns(cls):
    rows, columns = exact(cls, over="rows"), exact(cls, over="columns")
    S = gaussian(5, 8)
    assert torch.equal(rows.value(S), columns.value(S.mT)) and torch.equal(rows.grad(S), columns.grad(S.mT).mT)
    assert torch.equal(rows.conjugate(S / 99), columns.conjugate(S.mT / 99))


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_values(name):
    K = MAPS[name]
    assert isinstance(K, Map)
    assert hash(K) == hash(pickle.loads(pickle.dumps(K))) and pickle.loads(pickle.dumps(K)) == K
    assert eval(repr(K), {**vars(solvers), **vars(maps), "inf": float("inf")}) == K
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        K.anything = None


@pytest.mark.parametrize("name", MAPS)
def test_a_map_describes_its_problem_in_a_line(name):
    K = MAPS[name]
    assert K.describe(0.5, 2.0).startswith("min F") and "\n" not in K.describe(0.5, 2.0)
    assert K.describe(0.5, 2.0) != K.describe(0.5, 1.0) != K.describe(0.0)
    assert len({K.describe(0.5) for K in MAPS.values()}) > 80


@pytest.mark.parametrize("cls", [cls for cls in classes() if issubclass(cls, Thresholded)])
@pytest.mark.parametrize("relative", ["frobenius", "spectral"])
@pytest.mark.parametrize("over", LIFTS)
def test_a_relative_threshold_is_the_absolute_one_at_the_norm_of_each_matrix(cls, relative, over):
    S = torch.stack([gaussian(6, 9), 3e-5 * gaussian(6, 9, seed=1)])
    norms = torch.linalg.matrix_norm(S, ord="fro" if relative == "frobenius" else 2)
    K = exact(cls, 0.2, relative=relative, over=over)
    for s, D, value, norm in zip(S, K.grad(S), K.value(S), norms, strict=True):
        fixed = exact(cls, 0.2 * float(norm), over=over)
        # K and its gradient reach 4 at most; rounding of fp64.
        assert torch.allclose(D, fixed.grad(s), rtol=1e-9, atol=1e-14)
        assert float(value) == pytest.approx(float(fixed.value(s)), rel=1e-9)
    assert torch.allclose(K.grad(1e6 * S), K.grad(S) * 1e6**K.degree, rtol=1e-9)
    for verb in (K.conjugate, K.violation):
        with pytest.raises(ValueError, match=f"needs a fixed threshold, but with relative='{relative}'"):
            verb(S)
    assert "moves with each signal" in K.describe(0.1)


@pytest.mark.parametrize("name", [name for name, K in MAPS.items() if hasattr(K, "prox")])
def test_prox_is_the_minimiser(name):
    # At the minimiser X of K + ||X - S||^2 / (2 tau), (S - X) / tau is a subgradient of K at X: Fenchel-Young with equality.
    K = MAPS[name]
    for S in (gaussian(5, 8), 0.1 * gaussian(8, 5), torch.zeros(3, 4).double()):
        for tau in (0.1, 1.0, 7.0):
            X = K.prox(S, tau)
            D = (S - X) / tau
            u = magnitudes(D, K.over) if isinstance(K, Potential) else None
            star = K.conjugate(D * (1 - 1e-9)) if u is None or K.excess(u, K.a) < 1e-8 else torch.tensor(torch.inf)
            # Bisection to 1e-18 of S, conjugates moved inside their domain by 1e-9.
            assert abs(K.value(X) + star - inner(X, D)) < 1e-6, (tuple(S.shape), tau)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: maps.Power(0.0), r"Power needs 0 < p <= 1, got p=0.0; for p = 0 use Nuclear\(\)"),
        (lambda: maps.Power(1.5), "Power needs 0 < p <= 1, got p=1.5"),
        (lambda: maps.Schatten(0.5), r"Schatten needs p >= 1, got p=0.5; powers of the singular values are Power\(p\)"),
        (lambda: maps.Huber(0.0), "Huber needs a threshold 0 < a < inf, got a=0.0"),
        (lambda: maps.LogCosh(float("nan")), "LogCosh needs a threshold"),
        (lambda: maps.Clip(0.1, relative="nuclear"), "relative must be None, 'frobenius' or 'spectral', got 'nuclear'"),
        (lambda: maps.Huber(0.1, over="blocks"), "over must be one of 'spectrum', 'entries', .* got 'blocks'"),
        (lambda: maps.L1(over="spectrum"), "over must be one of 'entries', 'rows', 'columns', got 'spectrum'"),
        (lambda: maps.KyFan(0), "KyFan needs a whole count >= 1 of singular values, got count=0"),
        (lambda: maps.KyFan(1.5), "got count=1.5"),
        (lambda: maps.Ordered(()), r"Ordered needs positive weights that do not increase, got weights=\(\)"),
        (lambda: maps.Ordered((1.0, 2.0)), "do not increase"),
        (
            lambda: maps.HardGate(0.1, solver=solvers.tower()),
            r"tower\(\) cannot compute HardGate: .* jump and .*; use svd",
        ),
        (lambda: maps.KyFan(2, solver=solvers.tower()), r"tower\(\) cannot compute KyFan: it depends on a rank"),
        (lambda: maps.Huber(0.1, solver=solvers.krylov()), r"krylov\(\) computes functions of the leading"),
        (lambda: maps.Huber(0.1, solver=solvers.newton_schulz()), "solver must compute spectral functions, as .*tower"),
        (lambda: maps.Huber(0.1, solver=solvers.tower), "solver must compute spectral functions"),
        (lambda: maps.HalfNuclearSquared(solver=solvers.svd), "solver must be built, as"),
        (lambda: -1 * maps.Frobenius(), "a map can be multiplied by 0 < c < inf, got c=-1"),
        (lambda: maps.Frobenius() * float("inf"), "multiplied by 0 < c < inf, got c=inf"),
        (lambda: maps.Sum((maps.Frobenius(),)), "Sum needs at least two maps, got 1"),
        (lambda: maps.Frobenius() + 3, "a sum is of maps of schatten.maps, got 3"),
        (lambda: maps.Scaled(maps.Frobenius, 2.0), "a multiple is of a map of schatten.maps"),
    ],
)
def test_what_is_no_map_is_refused_at_construction(build, text):
    with pytest.raises((ValueError, TypeError), match=text):
        build()


@pytest.mark.parametrize("name", ZOO)
def test_the_default_solver_gives_a_direction_within_its_band(name):
    # <grad K(S), S> lies between 0.84 K(S) and 1.16 K(S): every sigma has a gain in that band. Singular values below
    # 1e-3 of the norm have less, at most 3e-3 of K(S) here; bf16 products, where the default uses them, another 1e-2.
    S = ZOO[name].float()
    K = maps.Nuclear()
    ratio = float(inner(K.grad(S).double(), S.double()) / K.value(S))
    assert 0.83 < ratio < 1.17


def test_the_nuclear_norm_is_what_it_says():
    K = maps.Nuclear(solvers.svd())
    S = torch.diag(torch.tensor([3.0, 4.0])).double()
    assert float(K.value(S)) == pytest.approx(7, abs=1e-12)
    for radius, violation in ((0.5, 0.0), (1.0, 0.0), (1.25, 0.25), (3.0, 2.0)):
        X = radius * torch.eye(3, 2).double()
        assert float(K.violation(X)) == pytest.approx(violation, abs=1e-12)
        assert float(K.conjugate(X)) == (0 if radius <= 1 else float("inf"))
    assert torch.equal(K.grad(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_an_orthogonal_matrix_is_no_violation_in_spite_of_rounding():
    for seed in range(10):
        Q = torch.linalg.qr(gaussian(40, 40, seed=seed))[0]
        assert maps.Nuclear().violation(Q) == 0


@pytest.mark.parametrize(
    ("weight_decay", "factor", "text"),
    [
        (0.5, 2.0, "min F subject to spectral norm <= 4.0"),
        (0.1, 1.0, "min F subject to spectral norm <= 10.0"),
        (0.0, 3.0, "min F, no constraint (weight_decay is 0)"),
    ],
)
def test_the_radius_of_muons_ball_is_the_shape_factor_over_the_decay(weight_decay, factor, text):
    assert maps.Nuclear().describe(weight_decay, factor) == text
