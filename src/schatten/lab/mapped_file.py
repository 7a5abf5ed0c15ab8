"""A file read through a read-only map: bytes come from the disk when a matrix needs them, and the kernel may drop them.

Not `torch.load(mmap=True)` or safetensors' own reader, whose private writable maps Linux refuses (ENOMEM) for a file that is
larger than memory and swap together; a shared read-only map is of any size, and nothing can write to the file through it.
"""

import mmap
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from schatten.lab.errors import InputError


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: what its header says, `read` for a view of its entries, and its `place`.

    Tensors of one place are one tensor under several names. `read` is None for what cannot be read as numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Hashable
    read: Callable[[], Tensor] | None


class MappedFile:
    """The bytes of the file `path`. Raises InputError for one that is empty or cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise InputError(f"{path} is empty: take another copy of it.")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None

    def head(self, count: int) -> bytes:
        return self.map[:count]

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], start: int = 0) -> Tensor:
        """A view of entries of `dtype` from byte `offset` on: strided as a tensor whose first entry is number `start`.

        Raises InputError where it would reach beyond the file.
        """
        if 0 in shape:
            return torch.empty(tuple(shape), dtype=dtype)
        count = start + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        end = offset + count * dtype.itemsize
        if offset < 0 or start < 0 or min(stride, default=0) < 0 or end > self.size:
            raise InputError(f"{self.path} is cut off or damaged: a tensor ends at byte {end:,} of {self.size:,}.")
        with warnings.catch_warnings():
            # Of memory that must not be written to; nothing here writes.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            if offset % dtype.itemsize:
                # Processors may refuse such numbers; writers of both formats align them, so this is rare.
                flat = torch.frombuffer(self.map, dtype=torch.uint8, count=end - offset, offset=offset).clone().view(dtype)
            else:
                flat = torch.frombuffer(self.map, dtype=dtype, count=count, offset=offset)
        return flat.as_strided(tuple(shape), tuple(stride), start)

    def forget(self) -> None:
        """Give the pages read so far back; what is read again comes from the disk or its cache."""
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)
