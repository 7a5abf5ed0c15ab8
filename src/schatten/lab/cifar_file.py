"""CIFAR-10's batches, as its archives hold them: Python pickles, read without running anything, or binary records.

A folder has `data_batch_1` .. `data_batch_5` and `test_batch` (pickled dictionaries of "data", count x 3072 bytes, and
"labels"), or the same names with `.bin` (records of one label and 3072 bytes). Pixels lie plane by plane: red, green, blue.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from schatten.lab.errors import InputError

CLASSES = 10
SHAPE = (3, 32, 32)
PIXELS = math.prod(SHAPE)

TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"

# What the archives unpack to.
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")

# All that an array of bytes asks for, by numpy's present and former names and through every pickle protocol.
NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
HARMLESS = {(module, name) for module in NUMPY for name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")}

Labelled = tuple[np.ndarray, np.ndarray]


def holds(folder: Path) -> bool:
    """Whether `folder`, or the archive's folder in it, has any of the batches."""
    return _place(folder) is not None


def read(folder: Path) -> tuple[Labelled, Labelled]:
    """Training and test images (count, 3, 32, 32) with labels, all uint8.

    Raises InputError, by the file's name, for what is missing, damaged or truncated, and for pickles of anything else.
    """
    place = _place(folder)
    assert place is not None
    directory, end = place
    batches: dict[str, Labelled] = {}
    for name in (*TRAIN, TEST):
        path = directory / f"{name}{end}"
        if not path.is_file():
            raise InputError(f"{directory} has no {path.name}: CIFAR-10 is five batches and {TEST}{end}.")
        batches[path.name] = (_binary if end else _pickled)(path)
    counts = {name: len(labels) for name, (_, labels) in batches.items()}
    usual = max(counts.values())
    for name, count in counts.items():
        # All batches are of one size: a file cut between two records shows in no other way.
        if count != usual:
            raise InputError(f"{directory / name} has {count} images, other batches {usual}: it was cut off.")
    *train, test = batches.values()
    return (np.concatenate([pixels for pixels, _ in train]), np.concatenate([labels for _, labels in train])), test


def _place(folder: Path) -> tuple[Path, str] | None:
    for directory in (folder, *(folder / name for name in FOLDERS)):
        for end in ("", ".bin"):
            if any((directory / f"{name}{end}").is_file() for name in (*TRAIN, TEST)):
                return directory, end
    return None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _binary(path: Path) -> Labelled:
    content = _content(path)
    if not content or len(content) % (1 + PIXELS):
        raise InputError(f"{path} has {len(content)} bytes, not whole records of {1 + PIXELS}: it is damaged or cut off.")
    records = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return records[:, 1:].reshape(-1, *SHAPE), _checked(path, records[:, 0])


def _checked(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.max() >= CLASSES:
        raise InputError(f"{path} has a label {labels.max()}: labels are 0 .. {CLASSES - 1}; it is damaged.")
    return labels


# -- pickles -----------------------------------------------------------------------------------------------------------


class _Call:
    """What a pickle asked to be called: noted, never called."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads the few names of an array of bytes as notes and refuses all others: no code named by a file is looked up."""

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., Any]:
        if (module_name, global_name) == ("_codecs", "encode"):
            # How protocols below 3 write bytes, keys among them.
            return lambda text, encoding: text.encode("latin1")
        if (module_name, global_name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is code, not images")
        # A function of its own for each name, so that nothing a file does to it outlives the file.
        return lambda *arguments: _Call(global_name, arguments)


def _pickled(path: Path) -> Labelled:
    content = _content(path)
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # Garbage makes the unpickler raise nearly anything.
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{path} is no batch of CIFAR-10, or damaged or cut off: {line}. Nothing was run.") from None
    if not isinstance(batch, dict):
        raise InputError(f"{path} is no batch of CIFAR-10: it holds a {type(batch).__name__}, not a dictionary.")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    pixels = _pixels(data)
    if pixels is None:
        raise InputError(f"{path} is no batch of CIFAR-10: its 'data' must be count x {PIXELS} bytes (uint8).")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise InputError(f"{path} is no batch of CIFAR-10: its 'labels' must be a list of whole numbers.")
    if len(labels) != len(pixels):
        raise InputError(f"{path} has {len(pixels)} images, but {len(labels)} labels: it is damaged.")
    wrong = next((label for label in labels if not 0 <= label < CLASSES), None)
    if wrong is not None:
        raise InputError(f"{path} has a label {wrong}: labels are 0 .. {CLASSES - 1}; it is damaged.")
    return pixels, np.array(labels, dtype=np.uint8)


def _pixels(data: Any) -> np.ndarray | None:
    """The images of a noted array of bytes, None of anything else."""
    match data:
        case _Call(name="_reconstruct", state=(1, shape, dtype, fortran, raw)):
            order = "F" if fortran else "C"
        case _Call(name="_frombuffer", arguments=(raw, dtype, shape, order)):
            pass
        case _:
            return None
    match dtype, shape:
        case _Call(name="dtype", arguments=("u1" | b"u1", *_)), (int() as count, width) if count > 0 and width == PIXELS:
            if isinstance(raw, (bytes, bytearray)) and len(raw) == count * PIXELS and order in ("C", "F"):
                return np.frombuffer(bytearray(raw), dtype=np.uint8).reshape((count, PIXELS), order=order).reshape(-1, *SHAPE)
    return None
