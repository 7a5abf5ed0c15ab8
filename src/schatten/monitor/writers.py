"""Writers: where records go. Each takes the records of one measurement; a function of yours takes them one by one."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any, Protocol

import torch

Record = Mapping[str, Any]

# Keys of a record that are no measured values.
NAMES = ("step", "name")

# Names of files, which a folder for TensorBoard would only have by mistake.
FILES = (".json", ".csv", ".tsv", ".txt", ".log", ".pt", ".pkl", ".yaml", ".html")


class Writer(Protocol):
    """`write` gets all records of one measured step; `close` ends it."""

    def write(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


class Calls:
    """Each record to a function."""

    def __init__(self, function: Callable[[Record], Any]) -> None:
        self.function = function

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            self.function(record)

    def close(self) -> None:
        pass


class JSONLines:
    """One JSON object on a line for each record, appended to a file; infinite and undefined numbers are null.

    Written out after each measurement, so a run that is killed loses none but the one under way; a line it has cut is ended
    before the next.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from schatten.monitor import JSONLines
        >>> file = Path(tempfile.mkdtemp()) / "run.jsonl"
        >>> JSONLines(file).write([{"step": 1, "name": "W", "update/rms": float("nan")}])
        >>> file.read_text()
        '{"step": 1, "name": "W", "update/rms": null}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.seek(0, SEEK_END):
                file.seek(-1, SEEK_END)
                file.write(b"" if file.read() == b"\n" else b"\n")

    def write(self, records: Sequence[Record]) -> None:
        # Opened each time: a file that is moved away is begun anew, and nothing waits in a buffer.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(_plain(record), allow_nan=False) + "\n" for record in records))

    def close(self) -> None:
        pass


class TensorBoard:
    """Scalars, and histograms of what has many values, under the tag "quantity/column/parameter".

    Args:
        to: a folder, or a `torch.utils.tensorboard.SummaryWriter`, which is left open.
        bins: edges of bins by "quantity/column", for lists that count what lies in each; its histograms have log10 of them.

    Raises ImportError where tensorboard is not installed.
    """

    def __init__(self, to: Any, bins: Mapping[str, Sequence[float]] | None = None) -> None:
        self.bins = bins or {}
        self.owned = isinstance(to, (str, Path))
        self.writer = _summary_writer(to) if self.owned else to

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            step, name = record["step"], record["name"]
            for key, value in record.items():
                if key in NAMES:
                    continue
                tag = f"{key}/{name}"
                if isinstance(value, str):
                    self.writer.add_text(tag, value, step)
                elif not isinstance(value, list):
                    self.writer.add_scalar(tag, value, step)
                elif all(math.isfinite(x) for x in value):
                    self._histogram(tag, value, self.bins.get(key), step)
        self.writer.flush()

    def _histogram(self, tag: str, values: Sequence[float], edges: Sequence[float] | None, step: int) -> None:
        if edges is None:
            self.writer.add_histogram(tag, torch.tensor(values, dtype=torch.float64), step)
            return
        low, *high = (math.log10(edge) for edge in edges)
        middle = [(a + b) / 2 for a, b in zip([low, *high], high, strict=False)]
        moments = [sum(n * x**k for n, x in zip(values, middle, strict=True)) for k in (1, 2)]
        self.writer.add_histogram_raw(tag, low, high[-1], sum(values), *moments, high, values, step)

    def close(self) -> None:
        if self.owned:
            self.writer.close()


def writers_of(to: Any, bins: Mapping[str, Sequence[float]]) -> list[Writer]:
    """Writers from what a user gives: None, a function, a path ending in .jsonl, a folder or a SummaryWriter, or several."""
    if to is None:
        return []
    if isinstance(to, (list, tuple)):
        return [writer for one in to for writer in writers_of(one, bins)]
    if isinstance(to, (str, Path)):
        kind = Path(to).suffix.lower()
        if kind in FILES or not str(to):
            raise ValueError(
                f"to must be a path ending in .jsonl, a folder for TensorBoard, a SummaryWriter, a function of a record or a "
                f"list of them, got {str(to)!r}: write {str(Path(to).with_suffix('.jsonl') if str(to) else 'run.jsonl')!r}."
            )
        return [JSONLines(to) if kind == ".jsonl" else TensorBoard(to, bins)]
    if hasattr(to, "add_scalar"):
        return [TensorBoard(to, bins)]
    if hasattr(to, "write") and hasattr(to, "close"):
        return [to]
    if callable(to):
        return [Calls(to)]
    raise TypeError(
        f"to must be a path ending in .jsonl, a folder for TensorBoard, a SummaryWriter, a function of a record or a list of "
        f"them, got {to!r}."
    )


def _summary_writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "Writing for TensorBoard needs tensorboard: pip install 'schatten[lab]', or pip install tensorboard",
            name=error.name,
        ) from error
    return SummaryWriter(str(folder))


def _plain(value: Any) -> Any:
    """JSON's values: numbers that it has no sign for are None."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
