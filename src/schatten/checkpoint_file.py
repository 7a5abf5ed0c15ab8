"""Checkpoint files: a torch.save file that knows whether it is whole.

The file is the zip archive torch.save writes, with its SHA-256 in the archive's comment, so `torch.load(path,
weights_only=True)` reads it as any other; `load` first compares the digest and so refuses a file that was cut off or
changed in a single bit. It is written beside its place and moved there when it is complete: a crash leaves the old file.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.placements.meshes import leads, meshes, together
from schatten.placements.states import whole_of

# The comment: this mark and the digest of all bytes before it.
MARK = b"schatten sha256 "

COMMENT_BYTES = len(MARK) + 2 * hashlib.sha256().digest_size

CHUNK = 1 << 20


class Stateful(Protocol):
    """What can be saved: an optimizer, also inside a wrapper such as accelerate's."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save(opt: Stateful, path: str | os.PathLike[str]) -> None:
    """Write `opt.state_dict()` and its digest to the file `path`, replacing it at once or not at all.

    Where state is divided among ranks (FSDP2, tensor parallel, `placement="zero1"`) all of them must call this together:
    the first gathers it, one tensor after the other, in its host's memory and writes the same file as a single process.

    Raises OSError where the folder does not exist or cannot be written to, and RuntimeError then on the other ranks.

    Example:
        >>> import pathlib, tempfile, torch, schatten
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "opt.pt"
        >>> opt = schatten.Muon(torch.nn.Linear(4, 4), lr=0.1)
        >>> schatten.save(opt, path)
        >>> torch.load(path, weights_only=True)["param_groups"][0]["lr"]
        0.1
    """
    state_dict = opt.state_dict()
    own = meshes(_tensors(state_dict))
    writes = leads(own)
    if own:
        state_dict = _gathered(state_dict, writes)
    together(lambda: _write(state_dict, Path(path)) if writes else None, own)


def load(opt: Stateful, path: str | os.PathLike[str]) -> None:
    """Continue from a file of `save`: check its digest, then `opt.load_state_dict`.

    The file may be of any number of ranks in any placement. Where state is divided among ranks all must call this together.

    Raises ValueError, and leaves the optimizer as it was, for a file that was cut off or changed, that `save` has not
    written, or whose content does not fit; FileNotFoundError for none; RuntimeError where another rank has raised.

    Example:
        >>> import pathlib, tempfile, torch, schatten
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "opt.pt"
        >>> schatten.save(schatten.Muon(torch.nn.Linear(4, 4), lr=0.1), path)
        >>> opt = schatten.Muon(torch.nn.Linear(4, 4), lr=0.9)
        >>> schatten.load(opt, path)
        >>> opt.param_groups[0]["lr"]
        0.1
        >>> _ = path.write_bytes(path.read_bytes()[:-1])
        >>> schatten.load(opt, path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: ...opt.pt does not end with a digest...
    """
    own = meshes(_tensors(opt.state_dict()))
    opt.load_state_dict(together(lambda: _read(Path(path)), own))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, Tensor):
        yield values


def _gathered(values: Any, keep: bool) -> Any:
    """`values` with whole tensors on the host in the place of divided ones; of those nothing where they are not to `keep`."""
    if isinstance(values, Mapping):
        return {key: _gathered(value, keep) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_gathered(value, keep) for value in values)
    if isinstance(values, DTensor):
        whole = whole_of(values)
        return whole.cpu() if keep else None
    return values


def _write(state_dict: dict[str, Any], path: Path) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("x+b") as file:
            torch.save(state_dict, file)
            # The last two bytes of a zip archive without a comment are the comment's length.
            file.seek(-2, os.SEEK_END)
            file.write(COMMENT_BYTES.to_bytes(2, "little"))
            file.write(MARK + _digest(file, file.tell()))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - COMMENT_BYTES
        file.seek(max(end, 0))
        comment = file.read()
        if not comment.startswith(MARK) or len(comment) < COMMENT_BYTES:
            raise ValueError(
                f"{path} does not end with a digest: either it was cut off, or schatten.save has not written it. What "
                f"torch.save has written loads without one by opt.load_state_dict(torch.load(path, weights_only=True))."
            )
        if comment != MARK + _digest(file, end):
            raise ValueError(f"{path} was changed after it was written: its SHA-256 is another. Take an earlier checkpoint.")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _digest(file: BinaryIO, end: int) -> bytes:
    """SHA-256 of the file's bytes before `end`, as hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while end > 0 and (chunk := file.read(min(CHUNK, end))):
        digest.update(chunk)
        end -= len(chunk)
    file.seek(0, os.SEEK_END)
    return digest.hexdigest().encode()
