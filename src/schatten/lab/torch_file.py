"""Files of torch.save, read by torch's restricted unpickler alone: no file is ever unpickled into code.

`torch.load(weights_only=True)` reads the zip format under a FakeTensorMode, which gives names, shapes and places in the file
without a byte of data; the data is then read through a map. The older format has no places and is loaded as a whole.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from schatten.lab.errors import InputError
from schatten.lab.mapped_file import MappedFile, Stored

WAY_OUT = (
    "Nothing was run. If you trust its source, load it yourself and save the weights alone: "
    "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
)

OPTIMIZER = "holds an optimizer's state, as schatten.save and torch.optim write it, not weights: name the model's file."


# Dictionaries within dictionaries that are followed, which a file could nest without end.
DEPTH = 8


def read_zip(file: MappedFile) -> tuple[list[Stored], tuple[str, ...]]:
    """The tensors of a file in the present format, and what there is to say. Raises InputError."""
    _check_zip(file)
    with FakeTensorMode():
        content = _load(file)
    found, notes = _weights(file, content)
    return [_mapped(file, name, t) for name, t in found], notes


def read_legacy(file: MappedFile) -> tuple[list[Stored], tuple[str, ...]]:
    """The same of a file from before PyTorch 1.6, which is loaded into memory as a whole."""
    found, notes = _weights(file, _load(file, map_location="cpu"))
    notes = (*notes, f"{file.path.name} is of the format before PyTorch 1.6, which cannot be mapped: all of it was loaded.")
    return [_loaded(name, t) for name, t in found], notes


def _check_zip(file: MappedFile) -> None:
    try:
        with zipfile.ZipFile(file.path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        raise InputError(f"{file.path} is a zip archive that was cut off or damaged: take another copy of it.") from None
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise InputError(f"{file.path} is a TorchScript program, which is not run here: save its state_dict() instead.")
    if not any(name.endswith("/data.pkl") for name in names):
        raise InputError(f"{file.path} is a zip archive, but none of torch.save.")


def _load(file: MappedFile, **options: Any) -> Any:
    try:
        with warnings.catch_warnings():
            # Tensor classes that torch itself rebuilds with a warning are none of the reader's concern.
            warnings.simplefilter("ignore")
            return torch.load(file.path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(file, str(error))) from None
    except NotImplementedError:
        raise InputError(f"{file.path} holds a tensor that is not an array of numbers, such as a quantised one.") from None
    except Exception as error:
        # Garbage makes the unpickler raise nearly anything; its own words follow as far as they are one line.
        raise InputError(f"{file.path} is damaged or no file of torch.save: {_line(error)}") from None


def _refusal(file: MappedFile, text: str) -> str:
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked is not None:
        return f"{file.path} asks for {asked[1]}, which is code, not weights: refused by torch's weights_only. {WAY_OUT}"
    if "Unsupported operand" in text:
        return f"{file.path} is a pickle, but none of torch.save: refused by torch's weights_only. {WAY_OUT}"
    return f"{file.path} was refused by torch's weights_only. {WAY_OUT}"


def _line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."


def _weights(file: MappedFile, content: Any) -> tuple[list[tuple[str, Tensor]], tuple[str, ...]]:
    """The named tensors: of the one dictionary that holds them, without optimizers' states."""
    if isinstance(content, Tensor):
        return [("tensor", content)], ()
    if not isinstance(content, Mapping):
        raise InputError(f"{file.path} holds a {type(content).__name__}, not a dictionary of tensors.")
    if _is_optimizer(content):
        raise InputError(f"{file.path} {OPTIMIZER}")
    at, notes = [], []
    while True:
        optimizers = [str(key) for key, value in content.items() if _is_optimizer(value)]
        inner = {key: v for key, v in content.items() if isinstance(v, Mapping) and str(key) not in optimizers and _matrices(v)}
        if optimizers:
            notes.append(f"left out, an optimizer's state: {', '.join(map(repr, optimizers))}.")
        content = {key: value for key, value in content.items() if str(key) not in optimizers}
        beside = any(isinstance(value, Tensor) and value.ndim > 1 for value in content.values())
        if len(inner) != 1 or beside or len(at) == DEPTH:
            break
        key, content = next(iter(inner.items()))
        at.append(str(key))
    if at:
        notes.append(f"weights are those under {' / '.join(map(repr, at))}.")
    found = list(_named(content, ""))
    if not found:
        if optimizers:
            raise InputError(f"{file.path} {OPTIMIZER}")
        raise InputError(f"{file.path} holds no tensors.")
    return found, tuple(notes)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _matrices(values: Mapping[Any, Any]) -> bool:
    return any(t.ndim > 1 for _, t in _named(values, ""))


def _named(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in values.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and not _is_optimizer(value) and prefix.count(".") < 2 * DEPTH:
            yield from _named(value, f"{prefix}{key}.")


def _mapped(file: MappedFile, name: str, t: Tensor) -> Stored:
    dtype = str(t.dtype).removeprefix("torch.")
    plain = t.layout == torch.strided and not t.is_quantized
    offset = getattr(t.untyped_storage(), "_checkpoint_offset", None) if plain else None
    if offset is None:
        # Sparse, quantised, or a subclass made of several tensors.
        return Stored(name, tuple(t.shape), dtype, (file.path, name), None)
    shape, stride, start = tuple(t.shape), tuple(t.stride()), int(t.storage_offset())
    place = (file.path, offset, start, shape, stride, dtype)
    return Stored(name, shape, dtype, place, lambda: file.tensor(offset, t.dtype, shape, stride, start))


def _loaded(name: str, t: Tensor) -> Stored:
    dtype = str(t.dtype).removeprefix("torch.")
    t = t.detach()
    if t.layout != torch.strided or t.is_quantized:
        return Stored(name, tuple(t.shape), dtype, (name,), None)
    place = (t.data_ptr(), tuple(t.shape), tuple(t.stride()), dtype) if t.numel() else (name,)
    return Stored(name, tuple(t.shape), dtype, place, lambda: t)
