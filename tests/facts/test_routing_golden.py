"""The plans of the families people train, printed as a user sees them: a change of routing shows as a change of a table.

tests/facts/routing_models.py builds the models and writes the tables in golden/.
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import schatten
from tests.facts.routing_models import GOLDEN, PEFT, TORCH, TRANSFORMERS, table


def needs(package, release, models):
    """The models, skipped where the package that builds them is of another release, whose modules have other names."""
    try:
        found = version(package)
    except PackageNotFoundError:
        found = None
    skip = pytest.mark.skipif(
        found is None or not found.startswith(release), reason=f"the tables are of {package} {release}x, here is {found}"
    )
    # peft 0.21 asks transformers for a property by its old name.
    quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    return [pytest.param(name, build, id=name, marks=[skip, quiet]) for name, build in models.items()]


MODELS = [*needs("torch", "", TORCH), *needs("transformers", "5.", TRANSFORMERS), *needs("peft", "0.", PEFT)]


@pytest.mark.parametrize(("name", "build"), MODELS)
def test_the_plan_is_the_recorded_one(name, build):
    assert table(build) == (GOLDEN / f"{name}.txt").read_text()


def test_every_recorded_plan_is_that_of_a_model():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*TORCH, *TRANSFORMERS, *PEFT}


@pytest.mark.parametrize(("name", "build"), MODELS)
def test_an_optimizer_of_the_model_trains_every_parameter_as_planned(name, build):
    with torch.device("meta"):
        model = build()
    opt = schatten.Muon(model)
    planned, _, kernels = str(opt.plan).rpartition("\n")
    assert f"{planned}\n" == (GOLDEN / f"{name}.txt").read_text() and kernels.startswith("kernels: eager (on ")
    trained = {id(p): g["algorithm"] for g in opt.param_groups for p in g["params"]}
    assert trained.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    named = dict(schatten.routing.named_parameters(model))
    assert all(trained[id(named[entry.name])] == entry.route for entry in opt.plan)
    # The groups' own layouts, written or implied by the shape, are those of the plan.
    layouts = {name: g["layout"] for g in opt.param_groups for name in g["param_names"] if g["algorithm"] == "spectral"}
    for entry in opt.plan:
        if entry.route == "spectral":
            assert schatten.layout.resolve(layouts[entry.name], entry.shape, entry.name) == entry.layout


@pytest.mark.parametrize(("name", "build"), MODELS)
def test_no_matrix_is_left_to_chance(name, build):
    # Rules that send everything to AdamW leave what the modules say in `strict`: it would raise for an unknown matrix.
    with torch.device("meta"):
        model = build()
    assert schatten.plan(model, strict=True) == schatten.plan(model, strict=False)
    assert not [entry.name for entry in schatten.plan(model) if "add a rule" in entry.reason]
