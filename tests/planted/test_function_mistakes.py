"""Broken towers: each mistake, one that has been made, leaves the two percent that `test_function_accuracy.py` allows."""

import importlib

import pytest
import torch

from schatten import maps, solvers
from schatten.kernels import eager
from schatten.solvers import iteration
from tests.contracts.matrices import gaussian
from tests.contracts.test_function_accuracy import RANGE, errors

tower = importlib.import_module("schatten.solvers.tower")

G = RANGE["log-uniform to the floor, wide"].float()
SOLVER = solvers.tower(dtype="float32")


def worst(K, X=G):
    exact = K.threshold(X.double())
    D = K.grad(X)
    if not D.isfinite().all():
        return float("inf")
    return errors(X, D, lambda s: K.h(s, exact))[0]


MAPS = {"power": maps.Power(0.5, solver=SOLVER), "tanh": maps.LogCosh(0.05, solver=SOLVER)}


@pytest.fixture(autouse=True)
def forget():
    """Fits made under a mistake must not outlive it."""
    yield
    tower.table.cache_clear()
    tower.constant.cache_clear()


@pytest.mark.parametrize("name", MAPS)
def test_without_a_mistake_the_error_is_two_percent(name):
    assert worst(MAPS[name]) <= 0.02


def test_normalising_by_the_frobenius_norm_is_caught(monkeypatch):
    # A wide spectrum slides below the fitted range.
    monkeypatch.setattr(tower, "spectral_norm_from_gram", lambda A: torch.ones(len(A), 1, 1))
    assert worst(MAPS["power"], gaussian(200, 200).float()) > 0.02


def test_a_table_at_the_wrong_end_is_caught(monkeypatch):
    right = tower._Table.at
    monkeypatch.setattr(tower._Table, "at", lambda self, rho: right(self, 1 / rho))
    assert worst(maps.LogCosh(0.003, solver=SOLVER)) > 0.02


def test_weights_fitted_for_absolute_errors_are_caught(monkeypatch):
    right = tower.fit_many
    monkeypatch.setattr(tower, "fit_many", lambda *a, error, **k: right(*a, error="absolute", **k))
    tower.table.cache_clear()
    assert worst(MAPS["tanh"]) > 0.02


def test_a_forgotten_scale_is_caught():
    # h(c s) = c^p h(s): without the factor a matrix of norm 1e-3 gets directions thirty times too long.
    class Forgotten(maps.Power):
        @property
        def degree(self):
            return 0.0

    assert worst(Forgotten(0.5, solver=SOLVER), 1e-3 * G) > 0.5


def test_a_dropped_iterate_is_caught(monkeypatch):
    assert worst(MAPS["power"]) <= 0.02  # and the restarts are chosen, which adds up iterates too
    right = eager._grow
    calls = []

    def dropping(total, X, weight):
        if total is not None:
            calls.append(1)
            if len(calls) != 1:
                right(total, X, weight)

    monkeypatch.setattr(eager, "_grow", dropping)
    assert worst(MAPS["power"]) > 0.02


def test_restarts_that_drop_what_was_summed_are_caught(monkeypatch):
    assert worst(MAPS["power"]) <= 0.02  # and the restarts are chosen by sums that drop nothing
    monkeypatch.setattr(iteration._Sums, "close", lambda self, X: setattr(self, "matrix", None))
    assert worst(MAPS["power"]) > 0.02


def test_products_in_the_wrong_order_are_caught(monkeypatch):
    # R <- (a I + Z) R instead of (a I + Z)^2 R.
    right = iteration.kernels.sym
    monkeypatch.setattr(iteration.kernels, "sym", lambda A, B, C, a, b, *p, **k: right(A, B, C, a, 0.5 * b, *p, **k))
    assert worst(MAPS["power"]) > 0.02
