"""A run directory: config.json, log.jsonl, checkpoints; written so that a killed process leaves it usable.

runs/NAME/config.json               the configuration, the data's fingerprint, versions
          log.jsonl                 one record per line: {"run": ..., "event": "train" | "eval" | "done", ...}
          checkpoints/RUN/          model.safetensors, optimizer and generator states of the last save
          tensorboard/RUN/          event files
          report.html, *.png        written from the files above
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schatten.lab.errors import InputError

# What a comparison writes besides checkpoints: logs, events, pictures.
RESERVE_BYTES = 64 << 20


class Store:
    """The files of one comparison under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = root / "log.jsonl"
        self.tensorboard = root / "tensorboard"

    def open(self, config: Mapping[str, Any], *, resume: bool, checkpoint_bytes: int) -> None:
        """Create the directory, or with `resume` continue one of the same configuration.

        Raises InputError, before anything is written, for a directory that holds something else, another
        configuration, or no room for `checkpoint_bytes`.
        """
        found = self.root / "config.json"
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--out {self.root} is a file: name a folder.")
        if found.exists():
            self._compare(config, json.loads(found.read_text()), resume)
            return
        if self.root.exists() and any(self.root.iterdir()):
            raise InputError(f"--out {self.root} holds files of something else: name an empty or new folder.")
        existing = next(parent for parent in (self.root, *self.root.absolute().parents) if parent.exists())
        free, needed = shutil.disk_usage(existing).free, checkpoint_bytes + RESERVE_BYTES
        if free < needed:
            raise InputError(
                f"--out {self.root} has {free >> 20} MiB free, this comparison needs {needed >> 20} MiB: "
                f"make room or name another disk."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(found, json.dumps(encoded(config), indent=1) + "\n")

    def _compare(self, config: Mapping[str, Any], saved: Mapping[str, Any], resume: bool) -> None:
        given = json.loads(json.dumps(encoded(config)))
        # Versions may change between sessions and the data may have moved (its fingerprint may not); what is trained stays.
        # An option that a folder does not know was not there when it was written, and is off.
        pairs = {key: (saved.get(key, False), given.get(key, False)) for key in sorted({*given, *saved} - {"versions", "data"})}
        differing = [f"{key}: {there} there, {now} now" for key, (there, now) in pairs.items() if there != now]
        if differing:
            raise InputError(f"--out {self.root} holds another comparison ({'; '.join(differing)}): name another folder.")
        if not resume:
            raise InputError(
                f"--out {self.root} holds this comparison already: add --resume to continue, or name another folder."
            )

    def records(self) -> list[dict[str, Any]]:
        """All log records; a last line cut short by a kill is left out."""
        if not self.log.exists():
            return []
        records = []
        for line in self.log.read_text().splitlines():
            try:
                records.append(decoded(json.loads(line)))
            except json.JSONDecodeError:
                continue
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(encoded(record)) + "\n")

    def rewind(self, run: str, step: int) -> None:
        """Forget what `run` logged after `step`, which it is about to repeat."""
        kept = [r for r in self.records() if r["run"] != run or r["step"] <= step]
        write_atomically(self.log, "".join(json.dumps(encoded(r)) + "\n" for r in kept))

    def results(self) -> dict[str, dict[str, Any]]:
        """The `done` record of every finished run by its id."""
        return {r["run"]: r for r in self.records() if r["event"] == "done"}

    def checkpoint(self, run: str) -> Path:
        return self.root / "checkpoints" / run


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` as a whole: a reader, or a kill, sees the old text or the new."""
    temporary = path.with_suffix(path.suffix + ".partial")
    temporary.write_text(text)
    temporary.replace(path)


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` in `target`'s place; a kill between the two renames leaves `target.old` behind."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def encoded(value: Any) -> Any:
    """JSON values; infinities and nan, which JSON lacks, as their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: encoded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(v) for v in value]
    return value


def decoded(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the names of `encoded` as floats again."""
    return {key: float(v) if v in ("inf", "-inf", "nan") else v for key, v in record.items()}
