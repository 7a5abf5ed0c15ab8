"""Quantities are found by name, say what they are, and are refused where they cannot be measured."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from schatten.diagnostics.core import Quantity
from schatten.monitor import Alarm, Monitor, chosen, known, page
from tests.contracts.monitoring import Plain, Reads, loss_of, muon, one_matrix, small


@pytest.mark.parametrize(
    "names, error, message",
    [
        (["gradiant"], ValueError, r"No quantity is named 'gradiant', did you mean 'gradient'\? Known are .*update"),
        (["gradient", "gradient"], ValueError, "measured once, got 'gradient' twice"),
        ("gradient", TypeError, r"write \['gradient'\]"),
        ([3], TypeError, "A quantity is a name or an object .* got 3; known names"),
        ([Reads], TypeError, "A quantity is a name or an object"),
        ([], ValueError, "at least one of"),
        (["curvature"], ValueError, "curvature evaluates the loss: pass loss="),
        # Before a training is under way, not at its first measured step.
        (["attention"], ValueError, r"No parameter is a query and a key projection by name, of W: pass Attention\(query="),
    ],
)
def test_quantities_that_cannot_be_are_refused(names, error, message):
    _, opt = one_matrix()
    with pytest.raises(error, match=message):
        Monitor(opt, 1, names)
    assert not opt._optimizer_step_pre_hooks


@pytest.mark.parametrize("every", [0, -1, 1.0, True, "2"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="every must be a positive number of steps"):
        Monitor(one_matrix()[1], every, ["update"])


def test_a_loss_without_its_model_is_refused():
    with pytest.raises(ValueError, match="pass that as model="):
        Monitor(one_matrix()[1], 1, ["curvature"], loss=lambda: torch.ones(()))


def test_other_optimizers_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"SpectralOptimizer, such as schatten.Muon, got AdamW: .* functions of schatten"):
        Monitor(torch.optim.AdamW([nn.Parameter(torch.ones(2, 2))]))


def test_options_of_a_quantity_are_those_of_its_instance():
    _, opt = one_matrix()
    exact = known()["gradient"](exact=True)
    with Monitor(opt, 1, [exact]) as monitor:
        opt.param_groups[0]["params"][0].grad = torch.eye(6, 4)
        opt.step()
    assert monitor.records[0]["gradient/effective_rank"] == pytest.approx(4.0)


@pytest.mark.parametrize("name", known())
def test_every_quantity_says_what_it_is(name):
    quantity = chosen([name])[0]
    assert isinstance(quantity, Quantity) and quantity.name == name and quantity.scope in ("matrix", "model")
    assert quantity.needs <= {"gradient", "momentum", "update", "hessian", "losses"}
    assert quantity.cost and quantity.columns and all("|" not in n and "/" not in n for n in quantity.columns)
    assert type(quantity).__dataclass_params__.frozen


@pytest.mark.parametrize("name", known())
def test_every_quantity_returns_the_columns_it_names_as_numbers_of_the_device(name):
    torch.manual_seed(0)
    model = Plain()
    opt = muon(model)
    quantity = small(name, Plain)
    loss = loss_of(model)
    with Monitor(opt, 2, [quantity], model=model, loss=[loss] * 3) as monitor:
        for _ in range(2):
            opt.zero_grad()
            loss().backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Alarm)
                opt.step()
    assert monitor.records
    for record in monitor.records:
        columns = {key.partition("/")[2] for key in record if "/" in key} - {"alarm"}
        assert columns and columns <= set(quantity.columns)


def test_the_page_has_the_table_of_all_quantities():
    text = (Path(__file__).parents[2] / "docs" / "instruments.md").read_text()
    assert page() in text, "run python scripts/instruments_table.py"
    assert all(f"| `{name}` |" in text for name in known())
