"""Laws of every quantity that a file of `schatten.diagnostics` announces: whoever adds one is held to them."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import schatten
from schatten.diagnostics.core import Block, Quantity, Whole
from schatten.monitor import known

NEEDS = {"gradient", "momentum", "update", "hessian", "losses"}

QUANTITIES = sorted(known())
OF_A_MATRIX = [name for name in QUANTITIES if known()[name].scope == "matrix"]

NORMUON = schatten.NorMuon([nn.Parameter(torch.zeros(2, 2))])

RULES = {
    "Muon": schatten.Rule(),
    # The default solver multiplies fp32 in bf16 where that is fast.
    "exact": schatten.Rule(map=schatten.maps.Nuclear(schatten.solvers.svd())),
    "LionK Huber": schatten.Rule(map=schatten.maps.Huber(0.1), scale=schatten.scales.Scale("none")),
    "no map": NORMUON.rule(NORMUON.param_groups[0]),
}

GROUP = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "betas": (0.9, 0.99), "step": 3, "maximize": False}


def block(shape=(2, 6, 4), *, rule="Muon", dtype=torch.float64, seed=0, empty=None):
    generator = torch.Generator().manual_seed(seed)
    W, G, M, U = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    h = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    tensors = {"gradient": G, "momentum": M, "update": 0.01 * U}
    tensors.update({} if empty is None else {key: torch.zeros_like(G) for key in empty})
    return Block("w", RULES[rule], dict(GROUP), W, hessian=lambda V: h * V, **tensors)


def whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    q, k = (nn.Parameter(torch.randn(4, 4).double()) for _ in range(2))
    batches = [(torch.randn(20, 4).double(), torch.randint(2, (20,))) for _ in range(16)]
    losses = [
        lambda x=x, y=y: nn.functional.cross_entropy(model(x), y) + (x @ q.T * (x @ k.T)).sum(-1).mean() for x, y in batches
    ]
    parameters = {**dict(model.named_parameters()), "attn.q_proj.weight": q, "attn.k_proj.weight": k}
    return Whole(parameters, [block((1, 6, 4), seed=1), block((1, 3, 6), seed=2)], losses)


def given(name):
    return block() if known()[name].scope == "matrix" else whole()


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_quantity_is_a_frozen_dataclass_that_says_what_it_reads_measures_and_costs(name):
    quantity = known()[name]
    assert isinstance(quantity(), Quantity)
    assert dataclasses.is_dataclass(quantity) and quantity.__dataclass_params__.frozen
    assert quantity.name == name and quantity.scope in ("matrix", "model")
    assert quantity.needs <= NEEDS and quantity.cost and quantity.columns
    assert (inspect.getdoc(quantity) or "").strip() and not (inspect.getdoc(quantity) or "").startswith(quantity.__name__ + "(")


@pytest.mark.parametrize("name", QUANTITIES)
def test_it_measures_what_its_columns_announce_and_numbers_of_each_block_or_of_all(name):
    of = given(name)
    found = known()[name]()(of)
    assert found, "an ordinary matrix under Muon, or an ordinary model, has every quantity"
    assert set(found) <= set(known()[name].columns)
    for column, value in found.items():
        assert isinstance(value, torch.Tensor), column
        assert not value.requires_grad, column
        assert value.ndim <= 2 and bool(torch.as_tensor(value).isfinite().all()), column


@pytest.mark.parametrize("name", QUANTITIES)
def test_the_same_matrix_has_the_same_values_and_the_generator_of_training_is_not_drawn_from(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = known()[name]()(given(name))
    torch.manual_seed(3)
    second = known()[name]()(given(name))
    if known()[name].scope == "matrix":
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[column], second[column]) for column in first)


@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_nothing_it_reads_is_written_to(name):
    of = block()
    before = {key: getattr(of, key).clone() for key in ("weight", "gradient", "momentum", "update")}
    known()[name]()(of)
    assert all(torch.equal(getattr(of, key), value) for key, value in before.items())


@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_a_matrix_without_gradient_momentum_or_update_does_not_raise(name):
    known()[name]()(block(empty=("gradient", "momentum", "update")))


@pytest.mark.parametrize("rule", ["LionK Huber", "no map"])
@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_other_rules_are_measured_or_left_out(name, rule):
    found = known()[name]()(block(rule=rule))
    assert set(found) <= set(known()[name].columns)


@pytest.mark.parametrize("shape", [(1, 1, 5), (1, 5, 1), (3, 4, 4)])
@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_rows_columns_and_banks_are_matrices_too(name, shape):
    known()[name]()(block(shape))


@pytest.mark.parametrize("name", OF_A_MATRIX)
def test_in_fp32_it_measures_the_same_to_that_precision(name):
    wide, narrow = (known()[name]()(block(rule="exact", dtype=dtype)) for dtype in (torch.float64, torch.float32))
    assert set(wide) == set(narrow)
    for column, value in wide.items():
        # Well-conditioned 6 x 4 matrices: 1e-7 through a few hundred operations; ratios of differences lose more.
        torch.testing.assert_close(narrow[column].double(), value.double(), rtol=2e-3, atol=1e-4, msg=column)
