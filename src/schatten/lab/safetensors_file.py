"""The safetensors format: eight bytes of length, a JSON header, and the tensors' bytes, read through a map.

Every number of the header is checked against the file before it is believed, so a damaged file is one line of text.
"""

import json
import math
from itertools import pairwise
from typing import Any

import torch

from schatten.lab.errors import InputError
from schatten.lab.mapped_file import MappedFile, Stored

# The format's own limit.
MAX_HEADER = 100_000_000

# Names of the format, and bits of an entry; those without a dtype are listed but not read.
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "I64": (64, torch.int64),
    "I32": (32, torch.int32),
    "I16": (16, torch.int16),
    "I8": (8, torch.int8),
    "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
    "C64": (64, torch.complex64),
    "U64": (64, None),
    "U32": (32, None),
    "U16": (16, None),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


def read(file: MappedFile) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a file and the texts in its header's `__metadata__`. Raises InputError for a damaged one."""
    path = file.path
    length = int.from_bytes(file.head(8), "little")
    if file.size < 8 or length > MAX_HEADER or length < 2:
        raise InputError(f"{path} is no safetensors file: its first 8 bytes are not the length of a header.")
    start = 8 + length
    if start > file.size:
        raise InputError(f"{path} is cut off: its header has {length:,} bytes, of which {max(file.size - 8, 0):,} are there.")
    try:
        header = json.loads(file.map[8:start].decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged: its header is not the JSON of a safetensors file.") from None
    if not isinstance(header, dict):
        raise InputError(f"{path} is damaged: its header is not the JSON of a safetensors file.")
    texts = header.pop("__metadata__", {})
    tensors = [_stored(file, start, name, entry) for name, entry in header.items()]
    ends = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if start + ends > file.size:
        raise InputError(f"{path} is cut off: its header speaks of {start + ends:,} bytes, it has {file.size:,}.")
    _without_overlap(file, header)
    if not isinstance(texts, dict):
        texts = {}
    return tensors, {key: value for key, value in texts.items() if isinstance(value, str)}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _stored(file: MappedFile, start: int, name: str, entry: Any) -> Stored:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{file.path} is damaged: its header does not say where {name!r} is.") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise InputError(f"{file.path} has {name!r} of dtype {code!r}, which is not known here.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise InputError(f"{file.path} is damaged: its header gives {name!r} shape {shape} and bytes {begin} to {end}.")
    bits, dtype = DTYPES[code]
    if end < begin or (end - begin) * 8 != math.prod(shape) * bits:
        raise InputError(f"{file.path} is damaged: {name!r} of shape {shape} and dtype {code} has {end - begin:,} bytes.")
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    view = None if dtype is None else (lambda: file.tensor(start + begin, dtype, shape, stride))
    text = code if dtype is None else str(dtype).removeprefix("torch.")
    return Stored(name, tuple(shape), text, (file.path, begin, name), view)


def _without_overlap(file: MappedFile, header: dict[str, Any]) -> None:
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, one), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise InputError(f"{file.path} is damaged: {one!r} and {other!r} have bytes in common.")
