"""The rows of an experiment on disk: each case is measured once, a killed run goes on where it was.

OUT/NAME/rows.jsonl      one row per case: the case, what was found, and under "run" config, versions, device, seconds
         config.json     the configuration all rows have
         checkpoints/    of trainings in progress
"""

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from schatten.lab.errors import InputError
from schatten.lab.store import decoded, encoded, write_atomically

Row = dict[str, Any]

# The repository of a checkout; an installed package has no .git there.
REPOSITORY = Path(__file__).parents[3]

# What is no case and no finding.
STAMP = "run"


class Ledger:
    """Rows of one configuration in `folder`; without a folder they are kept in memory alone.

    Under `accelerate launch` all processes measure together and take the rows of the first, which alone writes. `again`
    forgets what the folder holds.
    """

    def __init__(
        self, folder: Path | None, config: Mapping[str, Any], console: Console | None = None, *, again: bool = False
    ) -> None:
        self.root = folder
        self.console = console or Console(quiet=True)
        self.config = json.loads(json.dumps(encoded(config)))
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        if again and folder is not None and self.state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        self.state.wait_for_everyone()
        # Findings are JSON-safe; the order of rows is the order of cases of this run, whatever was on disk.
        self._known = {key(row["case"]): row for row in self._found()}
        self._asked: dict[str, Row] = {}
        self._say_what_is_kept()

    @property
    def rows(self) -> list[Row]:
        """The rows of the cases that this run has asked for, each once."""
        return list(self._asked.values())

    def measure(self, case: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Row:
        """The row of `case`: from disk, or `compute()` now. `case` holds plain values, `seed` among them where one is used."""
        known = self._known.get(key(case))
        if known is None:
            start = time.perf_counter()
            found = [json.loads(json.dumps(encoded(compute())))]
            if self.state.num_processes > 1:
                broadcast_object_list(found)
            stamp = {"config": self.config, "seconds": time.perf_counter() - start, **environment()}
            known = {"case": json.loads(json.dumps(encoded(case))), "found": found[0], STAMP: stamp}
            self._known[key(case)] = known
            self._append(known)
            if self.state.is_main_process:
                self.console.print(f"{_text(case)}: {_text(_short(found[0]))}", highlight=False, markup=False, soft_wrap=True)
        return self._asked.setdefault(key(case), flat(known))

    def checkpoints(self, case: Mapping[str, Any]) -> Path | None:
        """A folder for the checkpoints of the training behind `case`."""
        if self.root is None:
            return None
        words = "-".join(f"{v}" for v in case.values())
        # A name of a file has 255 bytes at most; the digest keeps cases apart whose words are equal that far.
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in words)[:80]
        return self.root / "checkpoints" / f"{name}-{hashlib.sha256(key(case).encode()).hexdigest()[:12]}"

    def _found(self) -> list[Row]:
        if self.root is None:
            return []
        saved = self.root / "config.json"
        new = not saved.exists()
        self.state.wait_for_everyone()  # before the first process makes what the others look for
        if new:
            if self.state.is_main_process:
                self.root.mkdir(parents=True, exist_ok=True)
                write_atomically(saved, json.dumps(self.config, indent=1) + "\n")
            self.state.wait_for_everyone()
            return []
        there = json.loads(saved.read_text())
        names = sorted({*there, *self.config})
        differing = [
            f"{n}: {there.get(n)} there, {self.config.get(n)} now" for n in names if there.get(n) != self.config.get(n)
        ]
        if differing:
            raise InputError(
                f"--out {self.root} holds rows of other settings ({'; '.join(differing)}): name another --out, or add "
                f"--again to replace them."
            )
        rows = raw_rows(self.root)
        file = self.root / "rows.jsonl"
        if self.state.is_main_process and file.exists() and not file.read_text().endswith("\n"):
            # Cut short by a kill: the next row must not be glued to it.
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def _say_what_is_kept(self) -> None:
        commits = {row[STAMP]["commit"] for row in self._known.values()}
        if commits and self.state.is_main_process:
            others = ", ".join(sorted(commits - {environment()["commit"]})) or "this one"
            self.console.print(f"{len(self._known)} rows are there, of commit {others}; --again measures anew", highlight=False)

    def _append(self, row: Row) -> None:
        if self.root is not None and self.state.is_main_process:
            with (self.root / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")


def rows_of(folder: Path) -> list[Row]:
    """The rows that a run left in `folder`, as `check` and `pictures` take them."""
    return [flat(row) for row in raw_rows(folder)]


def raw_rows(folder: Path) -> list[Row]:
    """The same as they stand in the file; a last line cut short by a kill is left out."""
    file = folder / "rows.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def flat(row: Row) -> Row:
    """Case and findings side by side, infinities and nan as floats again, and the stamp under "run"."""
    return {**decoded(row["case"]), **_numbers(row["found"]), STAMP: row[STAMP]}


def key(case: Mapping[str, Any]) -> str:
    return json.dumps(encoded(case), sort_keys=True)


@functools.cache
def environment() -> dict[str, Any]:
    """Versions, device and commit, the same for all rows of a process."""
    names = ("schatten", "torch", "accelerate", "numpy", "optuna")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if accelerator is None else f"{accelerator.type}: {torch.get_device_module(accelerator).get_device_name()}"
    machine = platform.processor() or platform.machine()
    return {
        "versions": versions,
        "device": device,
        "machine": f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "commit": _commit(),
    }


def _commit() -> str:
    if not (REPOSITORY / ".git").exists():
        return ""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in decoded(dict(value)).items()}
    if isinstance(value, list):
        return [float(v) if v in ("inf", "-inf", "nan") else _numbers(v) for v in value]
    return value


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """What fits on a line of the console: numbers and words, no curves."""
    return {k: v for k, v in found.items() if isinstance(v, (int, float, str, bool))}


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
