"""Published experiments, one per file: a question, where it was asked, a run that answers it and a table of the answer.

A new experiment is one new file here that holds `EXPERIMENT = Experiment(...)`. Its name is the file's, with dashes for
underscores; `schatten lab list` and `schatten lab run NAME` find it by the folder's listing.
"""

import importlib
import json
import os
import pkgutil
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from schatten.lab.store import encoded, write_atomically
from schatten.solvers.core import working_dtype

Row = dict[str, Any]

# The repository of a checkout; an installed package has no .git there.
REPOSITORY = Path(__file__).parents[4]


@dataclass(frozen=True)
class Experiment:
    """`run(seeds, out, console)` answers `question` with seeds 0 .. seeds-1, tells the console what it is at, leaves its
    rows as JSON in the folder `out` and returns them; `table(rows)` shows them. `source` is where the question was asked.
    """

    question: str
    source: str
    run: Callable[[int, Path, Console], list[Row]]
    table: Callable[[Sequence[Row]], Table]


def known() -> dict[str, Experiment]:
    """Every experiment of this folder by its name."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {file.replace("_", "-"): importlib.import_module(f"{__name__}.{file}").EXPERIMENT for file in files}


def save(path: Path, result: Mapping[str, Any]) -> None:
    """The result and what it ran on, as JSON; infinities and nan are written as their names."""
    machine = {
        "experiment": path.stem,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "working_dtype": str(working_dtype(torch.zeros(1), "auto")),
        "commit": _commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(encoded({**machine, **result}), indent=1) + "\n")


def _commit() -> str:
    if not (REPOSITORY / ".git").exists():
        return ""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
