"""The public surface: every name exists, is documented and its example runs; importing changes nothing and needs torch only."""

import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import schatten

# What design.md fixes and the library has by now; taking one away breaks users.
PROMISED = {
    *("Muon", "Lion", "SpectralSGD", "SpectralAdam", "Fanion", "FMuon", "SMuon", "Neon", "MuonMVR", "EF21Muon", "JaguarMuon"),
    *("MuonPlusPlus", "NorMuon", "AdaMuon", "Scion", "PolarGrad", "Hyperball", "SOAPMuon", "Dion", "Dion2"),
    *("Plan", "Rule", "SpectralOptimizer", "apply_map", "init_spectral_", "plan", "polar", "spectral_power"),
    *("Monitor", "diagnostics", "maps", "presets", "retractions", "scales", "signals", "solvers"),
}

OPTIONAL = {
    "jsonargparse",
    "peft",
    "accelerate",
    "datasets",
    "lightning",
    "matplotlib",
    "optuna",
    "plotly",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
    "triton",
    "typer",
}


def _beside(name: str) -> bool:
    """Whether a module is no part of the core, and may need packages that the core does not."""
    parts = ("schatten.lab", "schatten.cli", "schatten.integrations", "schatten.kernels.triton")
    return any(name == part or name.startswith(part + ".") for part in parts)


# `__main__` runs the command line when imported.
MODULES = sorted(m.name for m in pkgutil.walk_packages(schatten.__path__, "schatten.") if not m.name.endswith("__main__"))


def public(module):
    """The functions and classes a user meets in a module of the front page, without protocols, which cannot be called."""
    names = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__ and name[0] != "_"
    ]
    things = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    return {
        name: thing
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not getattr(thing, "_is_protocol", False)
    }


PARTS = [thing for name in schatten.__all__ if inspect.ismodule(thing := getattr(schatten, name))]
PUBLIC = {name: thing for module in (schatten, *PARTS) for name, thing in public(module).items()}


def test_the_front_page_is_written_out():
    assert set(schatten.__all__) >= PROMISED
    assert len(schatten.__all__) == len(set(schatten.__all__))  # their order is ruff's
    assert set(schatten.presets.__all__) <= set(schatten.__all__)
    assert all(hasattr(schatten, name) for name in schatten.__all__)
    assert schatten.__version__.count(".") >= 2
    assert (Path(schatten.__file__).parent / "py.typed").exists()


def test_every_file_of_presets_is_exported():
    folder = Path(schatten.presets.__file__).parent
    modules = [importlib.import_module(f"schatten.presets.{f.stem}") for f in folder.glob("*.py") if f.stem != "__init__"]
    own = {name for m in modules for name, thing in vars(m).items() if _is_preset(thing) and thing.__module__ == m.__name__}
    assert own == set(schatten.presets.__all__)


def _is_preset(thing):
    return inspect.isclass(thing) and issubclass(thing, schatten.SpectralOptimizer)


@pytest.mark.parametrize("name", schatten.__all__)
def test_every_name_says_what_it_is(name):
    first = (inspect.getdoc(getattr(schatten, name)) or "").split("\n")[0]
    assert len(first) > 20 and not first.startswith("dict("), f"{name} has no docstring of its own"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_and_class_has_an_example(name):
    assert ">>> " in (inspect.getdoc(PUBLIC[name]) or ""), f"{name} has no example"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_opens_with_its_idea_and_its_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if not _beside(name) or (error.name or "").startswith("schatten"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    assert module.__doc__, f"{name} has no docstring"
    failed, _ = doctest.testmod(module)
    assert failed == 0, f"{failed} examples of {name} fail; see the captured output"


@pytest.mark.parametrize("page", sorted(Path(__file__).parents[2].glob("docs/*.md")), ids=lambda page: page.name)
def test_the_examples_of_the_documentation_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0, f"{failed} examples of {page.name} fail; see the captured output"


@pytest.mark.parametrize("folder", ["maps", "solvers"])
def test_the_documentation_knows_every_map_and_solver(folder):
    pages = {"maps": "maps.md", "solvers": "accuracy.md"}
    text = (Path(__file__).parents[2] / "docs" / pages[folder]).read_text()
    abstract = {"Map", "Scaled", "Sum", "Solver", "FunctionSolver", "SpectralFunction", "fit", "krylov", "svd"}
    names = [name for name in getattr(schatten, folder).__all__ if name not in abstract]
    written = {"muon_p": "Muon^p"}
    assert not [name for name in names if written.get(name, name) not in text]


def test_the_examples_are_found():
    # Guards the test above against finding nothing: polar, plan, Muon, Rule, the engine, three solvers and a map.
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES if not _beside(name)]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 9


PROBE = """
import json, sys, torch

def state():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "seed": torch.initial_seed() if "seeded" in sys.argv else None,
        "random": torch.random.get_rng_state().sum().item() if "seeded" in sys.argv else None,
        "recompile limit": torch._dynamo.config.recompile_limit,
        "torch.optim": sorted(vars(torch.optim)),
    }

import torch._dynamo
torch.manual_seed(0)
sys.argv.append("seeded")
before, known = state(), set(sys.modules)
import schatten
print(json.dumps({"before": before, "after": state(), "new": sorted(set(sys.modules) - known)}))
"""


@pytest.fixture(scope="module")
def imported():
    """What one fresh interpreter saw of `import schatten`, with warnings as errors."""
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 1, f"importing printed: {run.stdout}"
    return json.loads(run.stdout)


def test_importing_changes_no_state_of_torch(imported):
    assert imported["after"] == imported["before"]


def test_importing_imports_no_optional_package(imported):
    # Beyond what torch itself imports, in an environment where most of them are installed.
    assert "schatten" in imported["new"]
    assert not OPTIONAL & {name.split(".")[0] for name in imported["new"]}


def test_the_lab_stays_out_of_the_core(imported):
    assert "schatten.optimizer" in imported["new"]
    assert not [name for name in imported["new"] if _beside(name)]
