"""What a checkpoint holds, whichever way it was written: a file, a sharded one, or a folder with either.

Headers are read, data is not: each tensor is a function that maps it. A file is known by its first bytes, not by its name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from schatten.lab import safetensors_file, torch_file
from schatten.lab.errors import InputError
from schatten.lab.mapped_file import MappedFile, Stored

INDEX = (".safetensors.index.json", ".bin.index.json")

# Weights by the names that transformers, accelerate, diffusers and peft give them, the ones to prefer first.
NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "consolidated.safetensors",
)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# What training leaves beside weights.
OTHERS = re.compile(r"^(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|custom_checkpoint)")

SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.safetensors$")

# Wrappers' names: DistributedDataParallel's at the front, the others anywhere.
WRAPPERS = re.compile(r"^module\.|(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

FOREIGN = {
    b"GGUF": "a GGUF file, whose weights are quantised",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the file itself",
    b"<!doctype html": "a web page: the download gave a page in the place of the file",
    b"<html": "a web page: the download gave a page in the place of the file",
}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name; `tied` names another name of one of them, `config` is config.json's content if it lies beside."""

    path: Path
    tensors: Mapping[str, Stored]
    tied: Mapping[str, str]
    config: Mapping[str, Any]
    notes: Sequence[str]
    files: Sequence[MappedFile]

    def forget(self) -> None:
        """Give the memory of what was read so far back."""
        for file in self.files:
            file.forget()


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of the checkpoint at `path`, a file or folder. Raises InputError with one line for anything else."""
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist: name a checkpoint's file or folder.")
        found = _in_folder(path) if path.is_dir() else [path]
        if len(found) == 1 and found[0].suffix == ".json":
            return _of_index(found[0])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    return _assembled(found[0].parent if len(found) > 1 else found[0], [(file, None) for file in found])


def _of_index(path: Path) -> Checkpoint:
    """A sharded checkpoint: its index says which file has which tensor."""
    if not path.name.endswith(INDEX):
        raise InputError(f"{path} is JSON, but no index of a sharded checkpoint: these end with {' or '.join(INDEX)}.")
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()) or not weight_map:
        raise InputError(f"{path} is no index of a sharded checkpoint: it has no weight_map of names and files.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    for shard in shards:
        parts = (*PurePosixPath(shard).parts, *PureWindowsPath(shard).parts)
        outside = PurePosixPath(shard).is_absolute() or PureWindowsPath(shard).drive or PureWindowsPath(shard).root
        if outside or ".." in parts or "\0" in shard:
            raise InputError(f"{path} names the shard {shard!r}, which is outside its folder: refused.")
    missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{path} names the shard {missing[0]!r}{more}, which is not there: the checkpoint is incomplete.")
    return _assembled(path, [(path.parent / shard, names) for shard, names in sorted(shards.items())])


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it is not a JSON object.")
    return content


def _in_folder(folder: Path) -> list[Path]:
    """The files of the weights in a folder: an index, one file, or shards that need no index."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for ending in INDEX:
        if found := [p for p in files if p.name.endswith(ending)]:
            return [_only(found, folder)]
    for name in NAMES:
        if folder / name in files:
            return [folder / name]
    _refuse_sharded_state(folder)
    weights = [p for p in files if p.suffix in SUFFIXES and not OTHERS.match(p.name)]
    shards = [(m[1], int(m[2]), int(m[3])) for p in weights if (m := SHARD.match(p.name))]
    if shards and len(shards) == len(weights) and len({(name, of) for name, _, of in shards}) == 1:
        missing = sorted(set(range(1, shards[0][2] + 1)) - {number for _, number, _ in shards})
        if missing:
            raise InputError(f"{folder} lacks shard {missing[0]} of {shards[0][2]}: the checkpoint is incomplete.")
        return weights
    if weights:
        return [_only(weights, folder)]
    below = [p.parent for name in (*NAMES, "*.index.json") for d in ("*", "*/*") for p in sorted(folder.glob(f"{d}/{name}"))]
    if below := list(dict.fromkeys(below)):
        raise InputError(f"{folder} has no weights of its own: name one of {_list(below)}.")
    raise InputError(f"{folder} holds no checkpoint: no index of shards, and no file that ends with {', '.join(SUFFIXES)}.")


def _only(found: Sequence[Path], folder: Path) -> Path:
    if len(found) > 1:
        raise InputError(f"{folder} holds several: name one of {_list(found)}.")
    return found[0]


def _list(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:6])) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def _refuse_sharded_state(folder: Path) -> None:
    """Formats whose own tools must put the pieces together."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("optimizer"))):
        if (place / ".metadata").exists() or any(place.glob("*.distcp")):
            raise InputError(
                f"{place} is a torch.distributed.checkpoint, whose .metadata is a pickle that would have to be run. If you "
                f"trust it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} model.pt, and diagnose "
                "model.pt."
            )
    if (folder / "zero_to_fp32.py").exists() or any(folder.glob("*zero_pp_rank_*")):
        raise InputError(f"{folder} holds DeepSpeed's shards: its own script joins them, `python zero_to_fp32.py . OUT`.")


def _assembled(path: Path, parts: Sequence[tuple[Path, Sequence[str] | None]]) -> Checkpoint:
    files, notes, tensors, tied = [], [], {}, {}
    for place, names in parts:
        file = MappedFile(place)
        stored, texts, own = _read(file)
        own_names = {t.name for t in stored}
        if names is not None and (lost := sorted(set(names) - own_names)):
            raise InputError(f"{place} lacks {lost[0]!r}, which the index says it holds: the checkpoint is damaged.")
        for t in stored:
            if t.name in tensors:
                raise InputError(f"{path} has {t.name!r} twice, in {place.name} and in another file.")
            tensors[t.name] = t
        # save_model of safetensors notes here which names it has left out, as they are others' tensors.
        tied |= {
            _printable(name): _printable(other) for name, other in texts.items() if other in own_names and name not in own_names
        }
        files.append(file)
        notes += own
    names = _unwrapped(tensors)
    if any(_printable(name) != plain for name, plain in names.items()):
        notes.append("names are without their wrappers' prefixes (module., _orig_mod. and the like).")
    places: dict[Any, str] = {}
    kept: dict[str, Stored] = {}
    for name, t in tensors.items():
        first = places.setdefault(t.place, names[name])
        if first == names[name]:
            kept[first] = t
        else:
            tied[names[name]] = first
    config = _config(files[0].path.parent)
    if config is None:
        notes.append("config.json beside the weights is damaged, so it told nothing about fused projections.")
    return Checkpoint(path, kept, tied, config or {}, tuple(dict.fromkeys(notes)), files)


def _read(file: MappedFile) -> tuple[list[Stored], dict[str, str], tuple[str, ...]]:
    """A file by its first bytes: its tensors, the texts of its header and what there is to say."""
    head = file.head(32)
    for start, what in FOREIGN.items():
        if head.lower().startswith(start.lower()):
            raise InputError(f"{file.path} is {what}.")
    if head.startswith(b"PK\x03\x04"):
        return _torch(torch_file.read_zip, file)
    if head[8:9] == b"{" or file.path.suffix == ".safetensors":
        return *safetensors_file.read(file), ()
    if head.startswith(b"\x80"):
        return _torch(torch_file.read_legacy, file)
    raise InputError(f"{file.path} is no checkpoint known here: neither safetensors nor a file of torch.save.")


def _torch(read: Callable[..., Any], file: MappedFile) -> tuple[list[Stored], dict[str, str], tuple[str, ...]]:
    tensors, notes = read(file)
    return tensors, {}, notes


def _unwrapped(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Names without wrappers' prefixes, unless two would be the same."""
    own = {name: _printable(name) for name in tensors}
    plain = {name: WRAPPERS.sub("", text) for name, text in own.items()}
    return plain if len(set(plain.values())) == len(plain) and all(plain.values()) else own


def _printable(name: str) -> str:
    """A name of a file, without codes that would command a terminal."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _config(folder: Path) -> dict[str, Any] | None:
    """config.json beside the weights, which may tell how projections are fused; None for a damaged one."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    text = content.get("text_config")
    return {**content, **text} if isinstance(text, dict) else content
