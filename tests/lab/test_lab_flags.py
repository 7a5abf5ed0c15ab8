"""Data that are missing are named by the flag that asked for them, before anything is measured."""

import dataclasses

import pytest

from schatten.lab import experiments
from schatten.lab.errors import InputError
from schatten.lab.ledger import Ledger

SOURCES = ("data", "mnist", "images", "text")

ASKED = [
    (name, field.name)
    for name in experiments.names()
    for field in dataclasses.fields(experiments.load(name).quick)
    if field.name in SOURCES
]


@pytest.mark.parametrize(("name", "field"), ASKED)
def test_missing_data_are_named_before_anything_is_measured(name, field):
    experiment, ledger = experiments.load(name), Ledger(None, {})
    config = dataclasses.replace(experiment.quick, **{field: "no-such-folder"})
    if (name, field) == ("convex-maps", "text"):
        config = dataclasses.replace(config, network="gpt")
    with pytest.raises(InputError, match=rf"--{field} no-such-folder"):
        experiment.run(config, ledger)
    assert not ledger.rows
