"""nanochat, modded-nanogpt, Moonlight, BeyondMuon (peers.md 1.13): capped steps, state by identity, an absolute eps."""

import inspect
import itertools
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import schatten
from schatten import presets, solvers
from schatten.solvers.power_function import PowerFunction
from tests.peer_bugs.helpers import (
    SOLVERS,
    Opt,
    P,
    assert_caught,
    cos,
    exact,
    gaussian,
    momenta,
    relative,
    solver_of,
    step,
    steps,
    sv,
)


def the_default_is_plain_muon(optimizer):
    # 3:1, the shape of fused QKV, which is split where it is declared and nowhere else.
    p, g = P(96, 32), gaussian(96, 32, seed=1)
    change = step(Opt([p], optimizer, lr=1.0, momentum=0.0, weight_decay=0.0), p, g)
    assert cos(-change, exact(g)) > 0.99


def test_the_default_is_plain_muon_also_for_a_matrix_three_times_as_tall_as_wide():
    the_default_is_plain_muon(schatten.Muon)


def test_a_split_that_nobody_declared_is_caught():
    assert_caught(the_default_is_plain_muon, "three times as tall is fused QKV")


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_do_not_split_a_matrix_by_its_shape(name):
    X = gaussian(96, 32)
    assert cos(solver_of(name)(X), exact(X)) > 0.95  # Keller's schedule leaves 0.97


def test_steps_above_five_are_not_capped():
    X = gaussian(32, 48)
    errors = [relative(solvers.polynomial(steps=n, dtype="float32")(X), exact(X)) for n in (5, 6, 7)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]
    assert not torch.equal(solvers.newton_schulz(steps=5)(X), solvers.newton_schulz(steps=6)(X))


def test_state_is_each_parameters_own(any_preset):
    params = [P(8, 8, seed=i) for i in range(3)]
    opt = any_preset(params)
    own = [{key: value.data_ptr() for key, value in opt.state[p].items()} for p in params]
    assert all(own) and len({address for state in own for address in state.values()}) == sum(map(len, own))


def test_a_missing_gradient_or_any_length_of_a_vector_is_no_crash(preset):
    params = [P(16, 8), P(7), P(1), P(3, 32), P(1, 16)]
    opt = Opt(params, preset, lr=0.01)
    for present in range(len(params)):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=i) if i != present else None
        opt.step()
    assert all(p.isfinite().all() for p in params)


IN_ANOTHER_PROCESS = """
import sys, torch, schatten

saved = torch.load(sys.argv[1], weights_only=True)
for name, state in saved.items():
    other = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    opt = getattr(schatten, name)(other)
    opt.load_state_dict(state)
    again = opt.state_dict()["state"]
    assert sorted(again) == [0, 1], name
    for i in again:
        assert again[i].keys() == state["state"][i].keys(), name
        assert all(torch.equal(again[i][k], v) for k, v in state["state"][i].items()), name
    print(name)
"""


def test_a_file_of_one_process_fills_the_state_of_another(tmp_path):
    saved = {}
    for name in presets.__all__:
        params = [P(8, 8), P(8, 8, seed=1)]
        opt = getattr(presets, name)(params)
        steps(opt, params, 2)
        saved[name] = opt.state_dict()
        if name == "Muon":
            assert len(momenta(opt)) == 2 and all(m.count_nonzero() for m in momenta(opt))
    torch.save(saved, tmp_path / "states.pt")
    run = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "states.pt")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == presets.__all__


def test_every_documented_argument_exists(any_preset):
    listed = str(inspect.getdoc(any_preset)).split("Args:")[1].split("State:")[0]
    names = [n.strip() for line in re.findall(r"^ {4}([a-z_0-9, ]+):", listed, re.M) for n in line.split(",")]
    known = set(inspect.signature(any_preset).parameters) | set(inspect.signature(schatten.SpectralOptimizer).parameters)
    assert names and set(names) <= known


def powers_are_equivariant(power, exponents=(0.25, 0.5, 0.75)):
    G = gaussian(16, 64)
    for s, p in itertools.product((1e-12, 1e-6, 1e6), exponents):
        assert relative(power(G * s, p) / s**p, power(G, p)) < 0.02, (s, p)


def test_a_power_does_not_depend_on_the_gradients_scale():
    powers_are_equivariant(schatten.spectral_power)


@pytest.mark.parametrize("solver", [solvers.coupled_minimax, solvers.svd], ids=lambda s: s.__name__)
def test_neither_do_the_solvers_of_powers(solver):
    powers_are_equivariant(lambda G, p: solver().apply(G, PowerFunction(p)), exponents=(0.25, 0.5))


def test_the_iteration_as_published_is_caught():
    # `coupled_newton` keeps the paper's absolute eps, "for comparison".
    with pytest.raises(AssertionError):
        powers_are_equivariant(lambda G, p: solvers.coupled_newton().apply(G, PowerFunction(p)), exponents=(0.5,))


def with_an_absolute_eps(G, p):
    """BeyondMuon: the Gram matrix plus 1e-6 I, whatever its size."""
    A = (G @ G.mT).double() + 1e-6 * torch.eye(G.shape[-2], dtype=torch.float64)
    L, V = torch.linalg.eigh(A)
    return ((V * L ** ((p - 1) / 2)) @ V.mT @ G.double()).to(G.dtype)


def test_a_power_with_an_absolute_eps_is_caught():
    assert relative(with_an_absolute_eps(gaussian(16, 64), 0.5), schatten.spectral_power(gaussian(16, 64), 0.5)) < 0.02
    with pytest.raises(AssertionError):
        powers_are_equivariant(with_an_absolute_eps)


def spread(decades):
    """A matrix with singular values from 1 to 10^-decades, and those values."""
    U, V = torch.linalg.qr(gaussian(12, 12))[0].double(), torch.linalg.qr(gaussian(20, 20, seed=1))[0].double()
    s = torch.logspace(0, -decades, 12, dtype=torch.float64)
    return (U * s) @ V[:, :12].mT, U, s, V[:, :12]


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_a_power_of_singular_values_spread_over_six_decades_is_exact_or_as_documented(p):
    X, U, s, V = spread(6)
    # The exact solver: 1e-6 becomes 1e-3 for p = 1/2.
    Y = solvers.svd().apply(X, PowerFunction(p))
    assert torch.allclose((U.mT @ Y @ V).diagonal(), s**p, rtol=1e-6)
    # The polynomial one: 2 % from 1e-3 of the largest, below it towards zero and never above or across it.
    got = (U.mT @ schatten.spectral_power(X, p) @ V).diagonal()
    large = s >= 0.999e-3
    assert ((got - s**p).abs() <= 0.02 * s**p)[large].all()
    assert (got[~large] > 0).all() and (got[~large] <= 1.02 * s[~large] ** p).all()


def test_a_spectral_power_is_of_the_whole_matrix_whatever_its_shape():
    X = gaussian(48, 16)
    assert torch.allclose(sv(schatten.spectral_power(X, 0.5)), sv(X).sqrt(), rtol=0.025)


def test_a_table_three_times_as_tall_as_wide_is_a_table():
    model = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 96), nn.Linear(96, 32))
    routes = {e.name: (e.route, e.layout) for e in schatten.plan(model)}
    assert routes["0.weight"][0] == "adamw" and routes["2.weight"] == ("spectral", "matrix")
