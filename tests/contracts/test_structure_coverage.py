"""Error bars of the structure of Hessians are right: value +- 2 errors holds the truth in 95 % of independent draws.

Of 200 draws with a true coverage of 95.4 % fewer than 90 % hold the truth once in 5000 times (3.7 standard deviations of the
binomial, 1.5 % each). Of bars a quarter as long between 28 % and 66 % must: Student's t with 3 or 4 degrees of freedom gives
49 to 53 %, and 4 standard deviations are 14 %. So errors are not right by being large.
"""

import pytest
import torch
from torch import nn

from schatten.diagnostics import probes as probes_file
from schatten.diagnostics.block_hessian import block_hessian, mass_within, structure
from schatten.diagnostics.block_mass import block_masses
from schatten.diagnostics.hessian_rank import hessian_spectrum
from tests.reference.structured_hessians import SHAPE, SPECTRA, network, products, rotated

DRAWS = 200
ENOUGH = 0.90
QUARTER = (0.28, 0.66)


def hessians():
    found = {name: (rotated(SPECTRA[name]), SHAPE) for name in ("outliers", "continuum", "low rank")}
    for activation in (nn.Tanh, nn.ReLU):
        product, W, _ = network(activation=activation, steps=5)
        found[activation.__name__] = (block_hessian(product, W), tuple(W.shape))
    return found


HESSIANS = hessians()


def held(estimates, truth, errors):
    return sum(bool((e.value - truth).abs() <= errors * e.error) for e in estimates) / len(estimates)


def spectra(name, probes, steps=16):
    H, shape = HESSIANS[name]
    like = torch.zeros(shape).double()
    return structure(H), [hessian_spectrum(products(H, shape), like, probes=probes, steps=steps, seed=s) for s in range(DRAWS)]


@pytest.mark.parametrize("name", ["outliers", "continuum", "low rank", "Tanh"])
def test_errors_of_rank_and_norms_are_right(name):
    exact, found = spectra(name, probes=4, steps=12)
    for key in ("nuclear", "effective_rank", "frobenius", "trace"):
        # Once most of the spectrum is known, what is left of ||H||_F^2 is a few squares, and a mean of 4 is skewed; so it says.
        assert held([getattr(f, key) for f in found], getattr(exact, key), 2) >= (0.85 if key == "frobenius" else ENOUGH), key
    # The trace has no error but that of chance, and so nothing on the safe side.
    assert QUARTER[0] <= held([f.trace for f in found], exact.trace, 0.5) <= QUARTER[1]


def test_errors_of_few_steps_hold_what_the_quadrature_misses():
    exact, found = spectra("low rank", probes=5, steps=6)
    assert held([f.nuclear for f in found], exact.nuclear, 2) >= ENOUGH
    biases = torch.stack([f.nuclear.value for f in found]).mean() / exact.nuclear - 1
    assert biases > 0.03, "six steps miss the kink of |x| here, or this test tests nothing"


def masses(name, probes):
    H, shape = HESSIANS[name]
    like = torch.zeros(shape).double()
    parts = {"rows": "rows", "columns": "columns"}
    found = [block_masses(products(H, shape), like, parts, probes=probes, steps=8, seed=s) for s in range(DRAWS)]
    return {part: (mass_within(H, shape, part), [f[part] for f in found]) for part in parts}


@pytest.mark.parametrize("name", ["outliers", "low rank", "Tanh", "ReLU"])
def test_errors_of_block_masses_are_right(name):
    for part, (truth, found) in masses(name, probes=5).items():
        assert held(found, truth, 2) >= ENOUGH, part
        assert QUARTER[0] <= held(found, truth, 0.5) <= QUARTER[1], part


def test_errors_without_students_t_would_be_caught(monkeypatch):
    monkeypatch.setattr(probes_file, "widening", lambda samples: 1.0)
    exact, found = spectra("continuum", probes=3, steps=3)
    assert held([f.trace for f in found], exact.trace, 2) < ENOUGH
