"""Broken curvatures: each mistake is caught by the comparison with the explicit Hessian, so that comparison can fail."""

from importlib import import_module

import pytest
import torch

from schatten.diagnostics.core import Estimate
from schatten.diagnostics.lanczos import lanczos
from tests.contracts import curvature_laws as laws

# The functions have their files' names.
right = import_module("schatten.diagnostics.curvature")


def plain(product, G, D=None, **options):
    return right.curvature(product, G, D, **options)


def polar(G):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


def transposed(product, G, D=None, **options):
    """D^T where the matrix is square, as from V in place of V^T."""
    D = polar(G) if D is None else D
    return right.curvature(product, G, D.mT if G.shape[0] == G.shape[1] else D, **options)


def other_vec(product, G, D=None, **options):
    """vec stacks columns in D and rows in the Hessian."""
    C = right.curvature(product, G, D, **options)
    D = polar(G) if D is None else D
    return C._replace(J=(D.mT.reshape(G.shape) * product(D.mT.reshape(G.shape))).sum())


def half(product, G, D=None, **options):
    """J / 2, as in the expansion of the loss."""
    C = right.curvature(product, G, D, **options)
    return C._replace(J=C.J / 2)


def unit(product, G, D=None, **options):
    """D of Frobenius norm 1, as for an eigenvector."""
    D = polar(G) if D is None else D
    return right.curvature(product, G, D / D.norm(), **options)


def signed(product, G, D=None, **options):
    """The largest eigenvalue, not the largest in size."""
    C = right.curvature(product, G, D, **options)
    return C._replace(L=Estimate(lanczos(lambda v: -product(v), G, G.numel()).values[-1], C.L.error))


def gradient_for_polar(product, G, D=None, **options):
    return right.curvature(product, G, G if D is None else D, **options)


def square_of_the_sum(product, G, D=None, **options):
    """nuc(G)^2 for <G, D>^2 of any direction."""
    C = right.curvature(product, G, D, **options)
    return C._replace(inner=C.nuclear)


def squared_norm(product, G, D=None, **options):
    C = right.curvature(product, G, D, **options)
    return C._replace(frobenius=C.frobenius**2)


MISTAKES = [transposed, other_vec, half, unit, signed, gradient_for_polar, square_of_the_sum, squared_norm]


def test_the_comparison_passes_what_is_right():
    laws.agrees(plain)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_the_comparison_finds(mistake):
    with pytest.raises(AssertionError):
        laws.agrees(mistake)
