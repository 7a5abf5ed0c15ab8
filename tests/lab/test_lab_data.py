"""Corpora: what loads, what is refused, and that batches depend on seed and step alone."""

import numpy as np
import pytest
import torch

from schatten.lab import data
from schatten.lab.errors import InputError

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_embedded_text_loads_without_files_or_network():
    corpus = data.load("pydoc", "byte", 64)
    assert corpus.vocabulary == 256
    assert len(corpus.train) > 300_000


def test_a_text_is_cut_ninety_to_ten_and_characters_are_numbered_in_order(text_file):
    corpus = data.load(str(text_file), "char", 8)
    assert len(corpus.train) + len(corpus.validation) == len(TEXT)
    assert len(corpus.train) == int(0.9 * len(TEXT))
    alphabet = sorted(set(TEXT))
    assert "".join(alphabet[i] for i in corpus.train[:45]) == TEXT[:45]
    assert corpus.vocabulary == len(alphabet)


def test_byte_pairs_are_learnt_from_the_corpus_and_shorten_it(text_file):
    corpus = data.load(str(text_file), "bpe:270", 8)
    assert corpus.vocabulary == 270
    assert len(corpus.train) < int(0.9 * len(TEXT))
    assert corpus.train.max() < 270


def test_a_folder_of_texts_is_read_in_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("b" * 200)
    (tmp_path / "a.txt").write_text("a" * 200)
    corpus = data.load(str(tmp_path), "byte", 8)
    assert corpus.train[0] == ord("a")


def test_nanogpt_memory_maps_are_read_in_place(tmp_path):
    tokens = np.arange(400, dtype=np.uint16) % 300
    tokens.tofile(tmp_path / "train.bin")
    tokens[:100].tofile(tmp_path / "val.bin")
    corpus = data.load(str(tmp_path), "byte", 8)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.vocabulary == 300
    assert np.array_equal(corpus.train, tokens)


def test_a_hugging_face_dataset_loads_by_name(tmp_path):
    pytest.importorskip("datasets", reason="needs schatten[hf]")
    (tmp_path / "train.txt").write_text(TEXT.replace(". ", ".\n"))
    corpus = data.load(f"hf:{tmp_path}", "byte", 8)
    assert bytes(corpus.train[:9].tolist()) == b"the quick"


@pytest.mark.parametrize(
    ("make", "tokens", "context", "message"),
    [
        (lambda path: path / "missing", "byte", 8, "does not exist"),
        (lambda path: path.joinpath("short.txt").write_text("abc") and path / "short.txt", "byte", 8, "context \\+ 2"),
        (lambda path: path.joinpath("empty.txt").write_text("") or path / "empty.txt", "char", 8, "empty"),
        (lambda path: path.joinpath("binary").write_bytes(b"\xff\xfe" * 99) and path / "binary", "byte", 8, "not UTF-8"),
        (lambda path: path.joinpath("t.txt").write_text(TEXT) and path / "t.txt", "bpe:5000", 8, "distinct pieces"),
        (lambda path: path.joinpath("t.txt").write_text(TEXT) and path / "t.txt", "bpe:100", 8, "no room"),
        (lambda path: path.joinpath("t.txt").write_text(TEXT) and path / "t.txt", "words", 8, "byte, char or bpe:N"),
        (lambda path: path.joinpath("folder").mkdir() or path / "folder", "byte", 8, "without"),
        (lambda path: "hf:/nowhere/at/all", "byte", 8, "hf:/nowhere/at/all"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, make, tokens, context, message):
    with pytest.raises(InputError, match=message):
        data.load(str(make(tmp_path)), tokens, context)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00" * 33, "33 bytes, not a whole number of uint16 tokens: it is damaged"),
        (b"", "0 bytes"),
        (np.arange(400, dtype=np.uint32).tobytes(), "tokens of 32 bits, nanoGPT's have 16"),
        (np.array([20240520, 1, 400, *[0] * 253], dtype=np.int32).tobytes() + b"\x01\x00" * 400, "llm.c's header"),
        (np.arange(9, dtype=np.uint16).tobytes(), r"validation part of .* has 9 tokens, a window needs context \+ 2 = 10"),
    ],
)
def test_a_memory_map_that_is_damaged_or_of_another_format_is_refused_by_name(tmp_path, content, message):
    np.arange(400, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "val.bin").write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        data.load(str(tmp_path), "byte", 8)
    assert str(tmp_path) in str(raised.value)


def test_a_memory_map_of_few_kinds_of_tokens_is_none_of_32_bits(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.tile(np.array([1, 0, 3, 2], dtype=np.uint16), 100).tofile(tmp_path / name)
    assert data.load(str(tmp_path), "byte", 8).vocabulary == 4


def test_half_a_folder_of_memory_maps_is_refused(tmp_path):
    np.arange(400, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(InputError, match=r"train\.bin but no val\.bin"):
        data.load(str(tmp_path), "byte", 8)
    (tmp_path / "val.bin").mkdir()
    with pytest.raises(InputError, match=r"val\.bin"):
        data.load(str(tmp_path), "byte", 8)


def test_a_text_cut_within_a_character_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes((TEXT + "naïve").encode()[:-3])
    with pytest.raises(InputError, match=r"text\.txt ends within a character, at byte 1802: it was cut off"):
        data.load(str(path), "byte", 8)


def test_batches_are_a_function_of_seed_and_step_alone():
    tokens = np.arange(1000)
    torch.manual_seed(1)
    first = data.batch(tokens, 8, 4, seed=3, step=5)
    torch.manual_seed(2)
    again = data.batch(tokens, 8, 4, seed=3, step=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], data.batch(tokens, 8, 4, seed=3, step=6)[0])
    assert not torch.equal(first[0], data.batch(tokens, 8, 4, seed=4, step=5)[0])


def test_targets_are_the_inputs_one_token_later():
    ids, targets = data.batch(np.arange(1000), 8, 4, seed=0, step=0)
    assert torch.equal(targets, ids + 1)
    ids, targets = data.validation_windows(np.arange(100), 8, 5)
    assert torch.equal(targets, ids + 1)
    assert len(ids) == 5
    assert len(data.validation_windows(np.arange(100), 8, 500)[0]) == 12  # floor((100 - 1) / 8): they never overlap
