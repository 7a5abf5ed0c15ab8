"""Published experiments, one per file or folder: the claim and its source, a run, and a comparison with what was published.

A new experiment is one new file here that holds `EXPERIMENT = Experiment(...)` (`lab.experiment`). Its name is the file's,
with dashes for underscores; `schatten lab list` and `schatten lab run NAME` find it by the folder's listing.
"""

import importlib
import inspect
import pkgutil

from schatten.lab.errors import InputError
from schatten.lab.experiment import Experiment


def names() -> list[str]:
    """Every experiment of this folder."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Experiment:
    """The experiment `name`. Raises InputError for one that is not here."""
    return _module(name).EXPERIMENT


def claim(name: str) -> str:
    """The question: the first sentence of its file."""
    return (inspect.getdoc(_module(name)) or "").splitlines()[0]


def text(name: str) -> str:
    """All that its file says of claim, source and settings."""
    return inspect.getdoc(_module(name)) or ""


def _module(name: str):
    if name not in names():
        raise InputError(f"NAME has no {name!r}: known are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
