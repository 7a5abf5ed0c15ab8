"""optax.contrib.muon (peers.md 1.12): schedules cut and repeated at will, NAdam for AdamW, complex input."""

import pytest
import torch
from torch import nn

import schatten
from schatten import solvers
from schatten.solvers.schedules import SCHEDULES
from tests.peer_bugs.helpers import SOLVERS, Opt, P, assert_caught, gaussian, raises, solver_of, step, sv
from tests.peer_bugs.mistakes import quintics

G = gaussian(32, 64)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_every_documented_schedule_exists_and_runs_up_to_its_length(name, steps):
    assert f'"{name}"' in str(solvers.newton_schulz.__doc__)
    assert (solvers.newton_schulz(name, steps=steps)(G) * G).sum() > 0


def fewer_steps_are_the_first_ones(build):
    """`build(schedule or None, steps)` is a solver."""
    schedule = SCHEDULES["polar-express"].quintics
    assert torch.equal(build(None, 5)(G), build(schedule[:5], None)(G))
    assert raises(ValueError, lambda: build(None, len(schedule) + 1)) or sv(build(None, len(schedule) + 1)(G)).max() < 1.3


def test_fewer_steps_of_a_schedule_are_its_first_ones():
    def build(schedule, steps):
        return solvers.newton_schulz("polar-express" if schedule is None else schedule, steps=steps, dtype="float32")

    fewer_steps_are_the_first_ones(build)


def test_the_last_steps_taken_instead_are_caught():
    schedule = list(SCHEDULES["polar-express"].quintics)

    def build(given, steps):
        taken = schedule[-steps:] if given is None else list(given)
        return lambda X: quintics(X / X.norm(), taken)

    with pytest.raises(AssertionError):
        fewer_steps_are_the_first_ones(build)


def test_quintics_and_a_number_of_steps_for_them_are_refused():
    own = SCHEDULES["polar-express"].quintics[:3]
    assert raises(ValueError, lambda: solvers.newton_schulz(own, steps=8))
    assert raises(ValueError, lambda: solvers.newton_schulz(own, steps=2))


def vectors_are_trained_by_torchs_adamw(optimizer):
    p, q = P(8), P(8)
    opt = Opt([p], optimizer, lr=0.01)
    (group,) = opt.param_groups
    betas, eps = group.get("betas", (0.9, 0.95)), group.get("eps", 1e-8)
    twin = torch.optim.AdamW([q], lr=group["lr"], betas=betas, eps=eps, weight_decay=group["weight_decay"])
    for g in gaussian(3, 8, seed=1):
        step(opt, p, g)
        q.grad = g.clone()
        twin.step()
    # The fused and the plain kernel of torch round differently, by ulps.
    assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


def test_the_half_that_is_adamw_is_torchs_adamw(preset):
    vectors_are_trained_by_torchs_adamw(preset)


def test_nadam_in_its_place_is_caught():
    assert_caught(vectors_are_trained_by_torchs_adamw, "AdamW is NAdam")


def test_nesterov_of_the_matrices_is_not_adams():
    ends = []
    for nesterov in (True, False):
        p = P(8)
        opt = Opt([p], lr=0.01, nesterov=nesterov)
        for g in gaussian(3, 8, seed=1):
            step(opt, p, g)
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", SOLVERS)
def test_complex_matrices_are_refused_in_words(name):
    with pytest.raises(TypeError, match=r"must be real floating point, got torch.complex64.*real and imaginary parts"):
        solver_of(name)(torch.randn(8, 16, dtype=torch.complex64))


def test_complex_matrices_are_refused_by_functions_and_optimizers(any_preset):
    Z = torch.randn(8, 16, dtype=torch.complex64)
    for refuse in (schatten.polar, lambda X: schatten.spectral_power(X, 0.5)):
        assert raises(TypeError, lambda refuse=refuse: refuse(Z))
    with pytest.raises(ValueError, match="is complex"):
        any_preset([nn.Parameter(Z)])
