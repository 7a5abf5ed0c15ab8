"""Instruments of the Hessian's structure with one mistake each; references and certificates must tell."""

from importlib import import_module

import pytest
import torch

from schatten.diagnostics.block_hessian import exact_hessian, mass_within, structure
from schatten.diagnostics.block_mass import block_mass
from schatten.diagnostics.hessian_rank import hessian_spectrum
from schatten.diagnostics.lanczos import lanczos
from schatten.diagnostics.probes import rademacher
from schatten.diagnostics.weighted_smoothness import weighted_smoothness
from tests.reference.structured_hessians import SHAPE, SPECTRA, gen, products, rotated

# The functions have their files' names.
mass_file = import_module("schatten.diagnostics.block_mass")
rank_file = import_module("schatten.diagnostics.hessian_rank")
weighted_file = import_module("schatten.diagnostics.weighted_smoothness")

H = rotated(SPECTRA["outliers"])
LIKE = torch.zeros(SHAPE).double()


def off_by(estimate, truth):
    """How many errors an estimate is away from the truth."""
    return float((estimate.value - truth).abs() / estimate.error)


def nuclear():
    return off_by(hessian_spectrum(products(H), LIKE, probes=40, steps=16).nuclear, structure(H).nuclear)


def rows(probes=100):
    return off_by(block_mass(products(H), LIKE, "rows", probes=probes, steps=4), mass_within(H, SHAPE, "rows"))


def test_without_a_mistake_both_agree():
    assert nuclear() < 4 and rows() < 4


def test_probes_that_are_not_freed_from_what_is_counted_are_seen(monkeypatch):
    def whole(basis, known, generator):
        z = rademacher(basis[0], generator)
        return z, z

    monkeypatch.setattr(rank_file, "rest_of_probe", whole)
    assert nuclear() > 6


def test_probes_of_the_wrong_length_are_seen(monkeypatch):
    right = rank_file.rest_of_probe
    monkeypatch.setattr(rank_file, "rest_of_probe", lambda *known: tuple(2 * z for z in right(*known)))
    assert nuclear() > 6


def test_a_sign_for_each_entry_in_place_of_each_row_is_seen(monkeypatch):
    monkeypatch.setattr(
        mass_file, "_parts", lambda partition, like: (torch.arange(like.numel()).view(like.shape), like.numel())
    )
    assert rows() > 6


def test_rows_for_columns_are_seen():
    found = block_mass(products(H), LIKE, "columns", probes=400, steps=4)
    assert off_by(found, mass_within(H, SHAPE, "rows")) > 6
    assert off_by(found, mass_within(H, SHAPE, "columns")) < 4


def test_a_mass_of_what_is_known_that_is_wrong_is_seen(monkeypatch):
    right = mass_file._mass_of_low_rank
    monkeypatch.setattr(mass_file, "_mass_of_low_rank", lambda *known: 1.5 * right(*known))
    assert rows() > 6


def test_a_product_that_is_no_hessian_is_told_by_its_asymmetry():
    A = torch.randn(6, 6, generator=gen(0), dtype=torch.float64)
    assert exact_hessian(lambda v: A @ v, torch.zeros(6).double()).asymmetry > 0.5


@pytest.mark.parametrize("shrink", [0.99, 0.5])
def test_a_lambda_that_is_too_small_is_told_by_its_margin(shrink):
    fit = weighted_smoothness(H, SHAPE)
    assert 1 - weighted_file._scale_that_bounds(shrink * fit.weights, H, SHAPE[0]) < 0 < fit.margin


def test_columns_stacked_in_place_of_rows_give_another_lambda():
    Q = rotated(torch.tensor([3.0, 1.0, -1.0, 0.5], dtype=torch.float64))
    shape = (3, 4)
    eye = torch.eye(3).double()
    right, wrong = (weighted_smoothness(M, shape).L_star for M in (torch.kron(eye, Q), torch.kron(Q, eye)))
    nuclear_norm = torch.linalg.matrix_norm(Q, "nuc")
    assert (right / nuclear_norm - 1).abs() < 1e-3
    assert (wrong / nuclear_norm - 1).abs() > 0.1


def test_a_bound_by_lanczos_alone_fails_for_few_steps():
    """Without `shortfall` the scale would come from below, and the bound would not hold."""
    few = lanczos(lambda v: H @ v, torch.zeros(60).double(), 4).values.abs().amax()
    assert few < structure(H).operator
