"""Tokens of a text: bytes, characters, or byte-pair encoding trained on the corpus by the tokenizers library."""

from collections.abc import Callable

import numpy as np

from schatten.lab.errors import InputError

Encode = Callable[[str], np.ndarray]


def encoder(tokens: str, text: str, training_text: str) -> tuple[Encode, int]:
    """The function from text to token ids that `tokens` names, and its vocabulary's size.

    `byte`: UTF-8 bytes, 256. `char`: the distinct characters of `text` in order. `bpe:N`: N byte-level merges and
    bytes, trained on `training_text` only.
    """
    if not text:
        raise InputError("The data is empty: give a text.")
    if tokens == "byte":
        return lambda part: np.frombuffer(part.encode("utf-8"), dtype=np.uint8), 256
    if tokens == "char":
        alphabet = sorted(set(text))
        table = {character: index for index, character in enumerate(alphabet)}
        return lambda part: np.array([table[character] for character in part], dtype=np.int32), len(alphabet)
    kind, _, size = tokens.partition(":")
    if kind != "bpe" or not size.isdigit():
        raise InputError(f"--tokens must be byte, char or bpe:N (such as bpe:4096), got {tokens!r}.")
    return _byte_pairs(int(size), training_text)


def _byte_pairs(size: int, training_text: str) -> tuple[Encode, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet):
        raise InputError(f"--tokens bpe:{size} has no room for the {len(alphabet)} bytes: take at least bpe:{len(alphabet)}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(training_text.splitlines(keepends=True), trainer)
    found = tokenizer.get_vocab_size()
    if found < size:
        raise InputError(f"--tokens bpe:{size} does not fit this text, which has {found} distinct pieces: take bpe:{found}.")
    return lambda part: np.array(tokenizer.encode(part).ids, dtype=np.int32), size
