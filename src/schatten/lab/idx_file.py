"""Labelled images in MNIST's IDX format: a magic number, the sizes as big-endian 32-bit numbers, then one byte per entry.

Files are `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of `t10k`, each plain or with `.gz`; MNIST,
Fashion-MNIST and KMNIST come so.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np

from schatten.lab.errors import InputError

CLASSES = 10

# Type 8 is unsigned bytes; the last byte of the magic number counts the dimensions.
UBYTE = 8

TRAIN_SHARE = 0.8

# Read at once, so that a file that expands without end is noticed when it exceeds its header.
CHUNK = 1 << 24

Labelled = tuple[np.ndarray, np.ndarray]


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def holds(folder: Path) -> bool:
    """Whether `folder` has the images of one of the two parts."""
    return any(_file(folder, part, "images", 3) is not None for part in ("train", "t10k"))


def read(folder: Path) -> tuple[Labelled, Labelled]:
    """Training and test images (count, 1, height, width) with labels, all uint8.

    Where only `t10k` is there, its first 80 % are for training and the rest for tests. Raises InputError, by the file's name,
    for what is missing, damaged or truncated.
    """
    if _file(folder, "train", "images", 3) is not None:
        return _part(folder, "train"), _part(folder, "t10k")
    pixels, labels = _part(folder, "t10k")
    cut = int(TRAIN_SHARE * len(labels))
    if cut == 0:
        raise InputError(f"{folder} has t10k files alone, with {len(labels)} image: too few to cut into training and test.")
    return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])


def _part(folder: Path, part: str) -> Labelled:
    files = []
    for kind, dimensions in (("images", 3), ("labels", 1)):
        file = _file(folder, part, kind, dimensions)
        if file is None:
            raise InputError(f"{folder} has no {part}-{kind}-idx{dimensions}-ubyte, plain or .gz: it is incomplete.")
        files.append((file, dimensions))
    (images_file, _), (labels_file, _) = files
    pixels, labels = (_array(file, dimensions) for file, dimensions in files)
    if len(pixels) != len(labels):
        raise InputError(f"{images_file} has {len(pixels)} images, but {labels_file.name} has {len(labels)} labels.")
    if labels.max() >= CLASSES:
        raise InputError(f"{labels_file} has a label {labels.max()}: labels are 0 .. {CLASSES - 1}; it is damaged.")
    return pixels[:, None], labels


def _file(folder: Path, part: str, kind: str, dimensions: int) -> Path | None:
    names = (f"{part}-{kind}{dot}idx{dimensions}-ubyte{end}" for end in ("", ".gz") for dot in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _array(path: Path, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parsed(path, file, dimensions)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a gzip file that was cut off or damaged ({error}): take another copy of it.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _parsed(path: Path, file: Readable, dimensions: int) -> np.ndarray:
    header = file.read(4 + 4 * dimensions)
    magic = bytes((0, 0, UBYTE, dimensions))
    if header[:4] != magic:
        kind = "images" if dimensions == 3 else "labels"
        begins = header[:4].hex() or "nothing"
        raise InputError(f"{path} begins with {begins}, IDX {kind} with {magic.hex()}: it is another file or damaged.")
    if len(header) < 4 + 4 * dimensions:
        raise InputError(f"{path} ends within its header, after {len(header)} bytes: it was cut off.")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    expected = math.prod(shape)
    if expected == 0:
        raise InputError(f"{path} has the sizes {shape} in its header: it is empty.")
    found = bytearray()
    while len(found) <= expected and (chunk := file.read(min(CHUNK, expected + 1 - len(found)))):
        found += chunk
    if len(found) != expected:
        there = f"more than {expected}" if len(found) > expected else str(len(found))
        sizes = " x ".join(map(str, shape))
        raise InputError(f"{path} has {there} bytes of data, its header says {sizes} = {expected}: it is damaged.")
    return np.frombuffer(found, dtype=np.uint8).reshape(shape)
