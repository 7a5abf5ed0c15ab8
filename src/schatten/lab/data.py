"""Text as token streams: from the standard library, a file, a folder, nanoGPT's memory maps or a Hugging Face dataset.

A corpus is two 1-D arrays of token ids, the first 90 % of a text for training and the last 10 % for validation. Batches
are a pure function of seed and step, so every optimizer of a comparison, and every resumed run, sees the same ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schatten.lab.errors import InputError
from schatten.lab.tokens import encoder

EMBEDDED = "pydoc"

TRAIN_SHARE = 0.9

# The first number of llm.c's token files, of GPT-2's and of Llama's tokens.
LLM_C = (20240520, 20240801)

# Of a token of 32 bits below 262,144, the upper 16 bits.
HIGH_HALF = 3


@dataclass(frozen=True)
class Corpus:
    """Token ids below `vocabulary`, 1-D arrays; `fingerprint` identifies source and tokens."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: int
    source: str
    fingerprint: str


def load(source: str, tokens: str, context: int) -> Corpus:
    """Read `source` and cut it into tokens.

    `source` is `"pydoc"` (the English texts of the standard library's `pydoc_data.topics`, read at run time), a text
    file, a `.bin` file of nanoGPT's tokens (uint16), a folder with its `train.bin` and `val.bin` or with `*.txt` files, or
    `hf:NAME`, a dataset of the `datasets` library with a `text` column. `tokens` is `byte`, `char` or `bpe:N`; memory maps
    bring their own.

    Raises InputError for a source that is missing, empty, not text or too short for one window of `context` tokens.
    """
    path = Path(source)
    if path.is_dir() and (path / "train.bin").exists():
        train, validation, vocabulary = _memory_maps(path)
    elif path.is_file() and path.suffix == ".bin":
        whole = _memory_map(path)
        cut = int(TRAIN_SHARE * len(whole))
        train, validation, vocabulary = whole[:cut], whole[cut:], 1 + int(whole.max())
    else:
        text = _read(source, path)
        cut = int(TRAIN_SHARE * len(text))
        encode, vocabulary = encoder(tokens, text, text[:cut])
        train, validation = encode(text[:cut]), encode(text[cut:])
    for name, part in (("training", train), ("validation", validation)):
        if len(part) < context + 2:
            raise InputError(
                f"The {name} part of {source} has {len(part)} tokens, a window needs context + 2 = {context + 2}: "
                f"give a longer text or a smaller --context."
            )
    return Corpus(train, validation, vocabulary, source, _fingerprint(train, validation, vocabulary))


def _read(source: str, path: Path) -> str:
    if source == EMBEDDED:
        from pydoc_data import topics

        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    if source.startswith("hf:"):
        return _hugging_face(source.removeprefix("hf:"))
    if path.is_file():
        return _decode(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"--data {source} is a folder without train.bin and val.bin and without *.txt files.")
        return "\n\n".join(_decode(file) for file in files)
    raise InputError(f"--data {source} does not exist: give a text file, a folder, '{EMBEDDED}' or hf:NAME.")


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise InputError(f"{path} ends within a character, at byte {error.start}: it was cut off.") from None
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or give train.bin and val.bin.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None


def _hugging_face(name: str) -> str:
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{name} needs the datasets library: pip install 'schatten[hf]'.") from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library's errors have no common class; any of them means no data
        raise InputError(f"hf:{name} could not be loaded: {str(error).splitlines()[0]}") from None
    if "text" not in (rows.column_names or []):
        raise InputError(f"hf:{name} has no column 'text', but {rows.column_names}.")
    texts = rows["text"]
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"hf:{name} has no text in row {wrong}, but {texts[wrong]!r}.")
    return "\n\n".join(texts)


def _memory_maps(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    parts = []
    for name in ("train.bin", "val.bin"):
        file = path / name
        if not file.exists():
            raise InputError(f"{path} has train.bin but no val.bin.")
        parts.append(_memory_map(file))
    return parts[0], parts[1], 1 + int(max(part.max() for part in parts))


def _memory_map(file: Path) -> np.ndarray:
    """Token ids of 16 bits; other widths and files with a header would read as tokens too, so they are told apart here."""
    try:
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise InputError(f"{file} has {size} bytes, not a whole number of uint16 tokens: it is damaged.")
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    if size >= 4 and int.from_bytes(tokens[:2].tobytes(), "little") in LLM_C:
        raise InputError(f"{file} begins with llm.c's header of 256 numbers, nanoGPT's files have none: cut it off.")
    start = tokens[: 1 << 16]
    if len(start) >= 64 and start[1::2].max() <= HIGH_HALF < start[::2].max():
        raise InputError(f"{file} seems to hold tokens of 32 bits, nanoGPT's have 16: write it as uint16.")
    return tokens


def _fingerprint(train: np.ndarray, validation: np.ndarray, vocabulary: int) -> str:
    digest = hashlib.sha256(f"{vocabulary} {len(train)} {len(validation)}".encode())
    for part in (train, validation):  # the ends are enough to tell corpora apart, and cheap on a memory map of 18 GB
        digest.update(np.ascontiguousarray(part[: 1 << 20]).astype(np.int64).tobytes())
        digest.update(np.ascontiguousarray(part[-(1 << 16) :]).astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def windows(tokens: np.ndarray, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-token targets, both (len(starts), context)."""
    rows = np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def batch(tokens: np.ndarray, context: int, size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """The training batch of a step: `size` windows at uniform places, a function of seed and step alone."""
    # Not torch's generator: on a CPU it keeps only the lower 32 bits of its seed.
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size)
    return windows(tokens, starts.tolist(), context)


def validation_windows(tokens: np.ndarray, context: int, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` windows that do not overlap, spread evenly over the validation part."""
    available = (len(tokens) - 1) // context
    chosen = np.linspace(0, available - 1, min(count, available)).round().astype(int)
    return windows(tokens, (chosen * context).tolist(), context)
