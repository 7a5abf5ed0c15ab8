"""Every map of the folder obeys every law of `map_laws`."""

import dataclasses
import pickle

import pytest
import torch

from schatten import maps, solvers
from schatten.maps import Map
from tests.contracts.map_laws import LAWS, SPECTRAL_LAWS, classes, exact, inner
from tests.contracts.matrices import ZOO, gaussian

# Maps of entries, rows or columns, which rotations change; name them here when one is added.
NOT_SPECTRAL: set[str] = set()

MAPS = classes()


def test_the_listing_finds_the_maps():
    assert "Nuclear" in {cls.__name__ for cls in MAPS}
    assert {cls.__name__ for cls in MAPS} >= NOT_SPECTRAL


@pytest.mark.parametrize("cls", MAPS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("law", (*LAWS, *SPECTRAL_LAWS), ids=lambda law: law.__name__)
def test_map(cls, law):
    if law in SPECTRAL_LAWS and cls.__name__ in NOT_SPECTRAL:
        pytest.skip("not a function of the singular values")
    law(exact(cls))


@pytest.mark.parametrize("cls", MAPS, ids=lambda cls: cls.__name__)
def test_maps_are_values(cls):
    K = exact(cls)
    assert isinstance(K, Map)
    assert exact(cls) == K and hash(exact(cls)) == hash(K) and pickle.loads(pickle.dumps(K)) == K
    assert eval(repr(K), {**vars(solvers), **vars(maps)}) == K
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(K, dataclasses.fields(K)[0].name, None)


@pytest.mark.parametrize("cls", MAPS, ids=lambda cls: cls.__name__)
def test_a_map_describes_its_problem_in_a_line(cls):
    K = exact(cls)
    assert K.describe(0.5, 2.0).startswith("min F") and "\n" not in K.describe(0.5, 2.0)
    assert K.describe(0.5, 2.0) != K.describe(0.5, 1.0) != K.describe(0.0)


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
        (0.5, 2.0, "min F subject to spectral norm <= 4"),
        (0.1, 1.0, "min F subject to spectral norm <= 10"),
        (0.0, 3.0, "min F, no constraint (weight_decay is 0)"),
    ],
)
def test_the_radius_of_muons_ball_is_the_shape_factor_over_the_decay(weight_decay, factor, text):
    assert maps.Nuclear().describe(weight_decay, factor) == text
