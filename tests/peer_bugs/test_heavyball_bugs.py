"""HomebrewML/HeavyBall (peers.md 1.9): a choice of solver ignored, noise in every run, raw momentum for vectors."""

import pytest
import torch

from schatten import solvers
from tests.peer_bugs.helpers import (
    SOLVERS,
    Opt,
    P,
    assert_caught,
    assert_solver_caught,
    d,
    exact,
    gaussian,
    solver_of,
    step,
    steps,
)
from tests.peer_bugs.test_emerging_optimizers_bugs import a_resumed_run_is_the_same_run

SHAPES = ((32, 32), (32, 48), (48, 32))


def it_is_exact_for_every_shape(solver, tolerance=1e-4):
    for shape in SHAPES:
        X = gaussian(*shape)
        assert (solver(X).double() - exact(X)).abs().max() < tolerance, shape


def test_the_svd_is_exact_for_every_shape():
    it_is_exact_for_every_shape(solvers.svd())


def test_a_chosen_solver_used_for_square_matrices_only_is_caught():
    assert_solver_caught(it_is_exact_for_every_shape, "the choice counts for square matrices only")


@pytest.mark.parametrize("build", [solvers.polynomial, solvers.gram], ids=lambda b: b.__name__)
def test_a_chosen_tolerance_holds_for_every_shape(build):
    it_is_exact_for_every_shape(build(tol=2e-3, dtype="float32"), tolerance=2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_optimizer_steps_with_the_solver_it_was_given(shape):
    X = gaussian(*shape, seed=10)
    assert (d(*shape, solver=solvers.svd()) - exact(X)).abs().max() < 1e-4
    results = [d(*shape, solver=solver_of(name)) for name in SOLVERS]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i] if shape[0] != shape[1])


def equal_calls_are_equal(solver):
    assert torch.equal(solver(gaussian(16, 24)), solver(gaussian(16, 24)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_input_gives_the_same_bits(name, dtype):
    equal_calls_are_equal(solver_of(name, dtype))


def test_a_solver_that_draws_noise_is_caught():
    assert_solver_caught(equal_calls_are_equal, "different every time")


def test_a_run_with_stochastic_rounding_repeats_and_resumes(any_preset):
    ends = []
    for _ in range(2):
        p = P(8, 6, dtype=torch.bfloat16)
        ends.append(steps(any_preset([p], lr=0.01, rounding="stochastic"), [p], 3)[0])
        torch.rand(1)  # other draws from the global generator between the runs
    assert torch.equal(*ends)
    if not any_preset.needs_closure:
        a_resumed_run_is_the_same_run(any_preset)


def the_gradients_size_does_not_move_a_vector_further(optimizer):
    lengths = []
    for scale in (1.0, 1e-4):
        p = P(64)
        lengths.append(float(step(Opt([p], optimizer, lr=0.01), p, scale * gaussian(64, seed=1)).norm()))
    assert abs(lengths[0] / lengths[1] - 1) < 0.05


def test_vectors_are_trained_by_adamw_not_by_raw_momentum(preset):
    the_gradients_size_does_not_move_a_vector_further(preset)


def test_raw_momentum_of_vectors_is_caught():
    assert_caught(the_gradients_size_does_not_move_a_vector_further, "vectors take raw momentum")
