"""`schatten diagnose` on files: every way that weights are written is read, everything else is one line, and nothing is run."""

import itertools
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from typer.testing import CliRunner

import schatten
from schatten.lab import mapped_file
from schatten.lab.checkpoint_reader import open_checkpoint
from schatten.lab.commands import app
from schatten.lab.errors import InputError


class Malicious:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(3, 5).bfloat16(), "c.bias": torch.randn(4)}


def contents(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the reader."""
    found = {}
    for name, stored in open_checkpoint(path).tensors.items():
        assert stored.read is not None
        t = stored.read()
        assert (tuple(t.shape), str(t.dtype)) == (stored.shape, f"torch.{stored.dtype}")
        found[name] = t.clone()
    return found


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def refused(path: Path, *words: str) -> str:
    """The one line that a path is refused with, by the reader and on the command line with exit code 2."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    assert all(word in text for word in words), text
    result = CliRunner().invoke(app, ["diagnose", str(path)])
    assert isinstance(result.exception, InputError) and str(result.exception) == text
    return text


def shards(folder: Path, tensors: dict[str, torch.Tensor], kind: str = "safetensors") -> Path:
    """A sharded checkpoint with one file for each tensor."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i, (name, t) in enumerate(tensors.items(), start=1):
        weight_map[name] = f"model-{i:05}-of-{len(tensors):05}.{kind}"
        file = folder / weight_map[name]
        save_file({name: t}, file) if kind == "safetensors" else torch.save({name: t}, file)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def header(path: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with a header of one's own."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# -- what is read ----------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_is_read_bit_for_bit(tmp_path):
    save_file(tensors := weights(), tmp_path / "m.safetensors")
    assert equal(contents(tmp_path / "m.safetensors"), tensors)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_is_read_bit_for_bit(tmp_path, new):
    tensors = weights()
    tensors["t.weight"], tensors["slice.weight"] = tensors["a.weight"].t(), torch.randn(9, 4)[2:5]
    torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    assert equal(contents(tmp_path / "m.pt"), tensors)


def test_a_file_is_known_by_its_first_bytes_and_not_by_its_name(tmp_path):
    tensors = weights()
    torch.save(tensors, tmp_path / "one.bin")
    save_file(tensors, tmp_path / "two.pt")
    assert equal(contents(tmp_path / "one.bin"), tensors) and equal(contents(tmp_path / "two.pt"), tensors)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_sharded_checkpoint_is_read_by_its_index_and_by_its_folder(tmp_path, kind):
    index = shards(tmp_path / "sharded", tensors := weights(), kind)
    assert equal(contents(index), tensors) and equal(contents(index.parent), tensors)


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    index = shards(tmp_path / "sharded", tensors := weights())
    index.unlink()
    assert equal(contents(index.parent), tensors)
    (index.parent / "model-00002-of-00003.safetensors").unlink()
    refused(index.parent, "lacks shard 2 of 3")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_a_trainer_is_read_without_its_optimizer(tmp_path, name):
    """What accelerate's save_state and transformers' Trainer leave."""
    tensors = weights()
    save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
    for other in ("optimizer.bin", "optimizer.pt", "scheduler.pt", "random_states_0.pkl", "rng_state.pth", "training_args.bin"):
        (tmp_path / other).write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    assert equal(contents(tmp_path), tensors) and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "whatever"])
def test_weights_are_found_within_dictionaries(tmp_path, key):
    tensors, model = weights(), nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    # As Lightning writes it, with a tensor among its counters.
    content = {key: tensors, "optimizer": optimizer.state_dict(), "epoch": 3, "callbacks": {"best": torch.ones(())}}
    torch.save(content, tmp_path / "m.ckpt")
    assert equal(contents(tmp_path / "m.ckpt"), tensors)
    notes = " ".join(open_checkpoint(tmp_path / "m.ckpt").notes)
    assert f"under '{key}'" in notes and "left out, an optimizer's state: 'optimizer'" in notes


def test_two_dictionaries_of_weights_are_both_read(tmp_path):
    torch.save({"model": weights(), "ema": weights()}, tmp_path / "m.pt")
    assert {name.split(".")[0] for name in contents(tmp_path / "m.pt")} == {"model", "ema"}


def test_names_lose_the_prefixes_of_wrappers(tmp_path):
    tensors = weights()
    torch.save({f"module._orig_mod.{name}": t for name, t in tensors.items()}, tmp_path / "m.pt")
    assert equal(contents(tmp_path / "m.pt"), tensors)


def test_tied_tensors_are_read_once(tmp_path):
    table = torch.randn(7, 4)
    torch.save({"emb.weight": table, "head.weight": table, "view.weight": table[:3]}, tmp_path / "m.pt")
    found = open_checkpoint(tmp_path / "m.pt")
    assert set(found.tensors) == {"emb.weight", "view.weight"} and found.tied == {"head.weight": "emb.weight"}
    model = nn.ModuleDict({"emb": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["emb"].weight
    save_model(model, str(tmp_path / "m.safetensors"))
    found = open_checkpoint(tmp_path / "m.safetensors")
    assert len(found.tensors) == 1 and len(found.tied) == 1


def test_what_is_no_array_of_numbers_is_listed(tmp_path):
    save_file({"i.weight": torch.ones(3, 3, dtype=torch.int64), "w": torch.eye(3)}, tmp_path / "m.safetensors")
    torch.save({"s.weight": torch.eye(3).to_sparse(), "w": torch.eye(3)}, tmp_path / "m.pt")
    for file, why in (("m.safetensors", "int64: no floating-point numbers"), ("m.pt", "not an array of numbers")):
        result = CliRunner().invoke(app, ["diagnose", str(tmp_path / file)])
        assert result.exit_code == 0 and why in result.output


def test_a_damaged_config_beside_the_weights_is_said(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert "config.json beside the weights is damaged" in " ".join(open_checkpoint(tmp_path).notes)


def test_an_empty_tensor_and_a_scalar_are_read(tmp_path):
    tensors = {"none.weight": torch.empty(0, 4), "one": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "m.safetensors")
    torch.save(tensors, tmp_path / "m.pt")
    assert equal(contents(tmp_path / "m.safetensors"), tensors) and equal(contents(tmp_path / "m.pt"), tensors)


# -- what is not run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("forced", [True, False], ids=["forced by the environment", "plain"])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch, new, forced):
    """Not even where the environment asks torch for full unpickling."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    file = tmp_path / "m.pt"
    torch.save({"w": torch.eye(3), "x": Malicious(marker)}, file, _use_new_zipfile_serialization=new)
    refused(file, "posix.system", "Nothing was run")
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file would have run"


def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    refused(tmp_path / "m.bin", "pickle")
    assert not (tmp_path / "marker").exists()


def test_objects_of_classes_are_refused_by_name(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "torch.nn.modules.linear.Linear", "Nothing was run", "safetensors.torch.save_file")


def test_a_distributed_checkpoint_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    refused(tmp_path / "pytorch_model_fsdp_0", ".metadata is a pickle", "dcp_to_torch")
    refused(tmp_path, "dcp_to_torch", "pytorch_model_fsdp_0")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..\\secret.safetensors", "C:\\x", "\0"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, shard):
    save_file(weights(), tmp_path / "secret.safetensors")
    index = shards(tmp_path / "sharded", weights())
    index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    refused(index, "outside its folder")


def test_shards_may_be_links_as_in_a_download_cache(tmp_path):
    index = shards(tmp_path / "blobs", tensors := weights())
    (tmp_path / "snapshot").mkdir()
    for file in index.parent.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert equal(contents(tmp_path / "snapshot"), tensors)


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path):
    save_file({"a.weight": torch.randn(6, 4)}, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    for length in (*range(1, len(whole), 7), len(whole) - 1):
        (tmp_path / "m.safetensors").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut off|no safetensors|damaged"):
            contents(tmp_path / "m.safetensors")
    refused(tmp_path / "m.safetensors", "cut off", f"{len(whole):,}")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_truncations_of_a_torch_file_are_refused(tmp_path, new):
    torch.save({"a.weight": torch.randn(60, 40)}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    whole = (tmp_path / "m.pt").read_bytes()
    for length in (3, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "m.pt").write_bytes(whole[:length])
        refused(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 82]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [1 << 70, (1 << 70) + 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2, 2]},
        {"dtype": "X9", "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 16]},
        [],
        None,
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    refused(header(tmp_path / "m.safetensors", {"w": entry}, bytes(16)))


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (b"garbage!", None),
        (b"[1, 2]", None),
        (b"{", 1 << 62),
        (b'{"w": 1', None),
        (b"\xff\xfe{}", None),
        (b"[" * 100_000, None),
        (b"{}", 0),
        (b"{}", 90_000_000),
    ],
    ids=["garbage", "a list", "huge", "unclosed", "no utf-8", "deep", "zero", "longer than the file"],
)
def test_a_garbled_header_is_refused(tmp_path, text, length):
    refused(header(tmp_path / "m.safetensors", text, length=length))


def test_tensors_that_overlap_and_names_given_twice_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    refused(header(tmp_path / "m.safetensors", {"a": entry, "b": entry}, bytes(16)), "bytes in common")
    one = json.dumps(entry)
    refused(header(tmp_path / "m.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(16)), "header")


def test_random_bytes_and_flipped_bits_raise_nothing_but_one_line(tmp_path):
    save_file(weights(), tmp_path / "m.safetensors")
    torch.save(weights(), tmp_path / "m.pt")
    generator = torch.Generator().manual_seed(1)
    for file, _ in itertools.product((tmp_path / "m.safetensors", tmp_path / "m.pt"), range(60)):
        whole = bytearray(file.read_bytes())
        place = int(torch.randint(len(whole), (), generator=generator))
        whole[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        broken = tmp_path / f"broken{file.suffix}"
        broken.write_bytes(whole)
        try:
            contents(broken)
        except InputError as error:
            assert "\n" not in str(error)
    for length in (1, 7, 8, 9, 100):
        (tmp_path / "noise.bin").write_bytes(bytes(torch.randint(256, (length,), generator=generator).tolist()))
        refused(tmp_path / "noise.bin")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("empty.safetensors", b"", "empty"),
        ("text.txt", b"just some words, no weights", "no checkpoint known here"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("page.bin", b"<!DOCTYPE html><html></html>", "web page"),
        ("m.gguf", b"GGUF\x03\0\0\0", "GGUF"),
        ("m.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("other.json", b"{}", "no index"),
        ("model.safetensors.index.json", b"{}", "weight_map"),
        ("model.bin.index.json", b"{not json", "not JSON"),
    ],
)
def test_foreign_files_are_named(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, word)


def test_a_zip_that_is_no_torch_file_and_a_program_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("words.txt", "none")
    refused(tmp_path / "m.pt", "none of torch.save")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        archive.writestr("m/data.pkl", "")
        archive.writestr("m/constants.pkl", "")
    refused(tmp_path / "program.pt", "TorchScript")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, "words", {}])
def test_a_torch_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "holds")


def test_an_optimizers_state_is_named_as_such(tmp_path):
    opt = schatten.Muon(nn.Linear(4, 4), lr=0.1)
    schatten.save(opt, tmp_path / "opt.pt")
    torch.save({"optimizer": opt.state_dict()}, tmp_path / "wrapped.pt")
    refused(tmp_path / "opt.pt", "optimizer's state", "schatten.save")
    refused(tmp_path / "wrapped.pt", "optimizer's state")


def test_a_missing_shard_and_a_shard_without_its_tensor_are_refused(tmp_path):
    index = shards(tmp_path / "sharded", weights())
    save_file({"another": torch.eye(3)}, tmp_path / "sharded" / "model-00002-of-00003.safetensors")
    refused(index, "lacks 'b.weight'")
    (tmp_path / "sharded" / "model-00003-of-00003.safetensors").unlink()
    refused(index, "model-00003-of-00003.safetensors", "not there")


def test_a_folder_without_a_checkpoint_says_where_some_are(tmp_path):
    refused(tmp_path, "holds no checkpoint")
    (tmp_path / "checkpoints" / "run").mkdir(parents=True)
    save_file(weights(), tmp_path / "checkpoints" / "run" / "model.safetensors")
    refused(tmp_path, "name one of", str(tmp_path / "checkpoints" / "run"))
    refused(tmp_path / "nowhere", "does not exist")


def test_a_folder_with_several_files_asks_for_one(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file(weights(), tmp_path / name)
    refused(tmp_path, "name one of", "one.safetensors", "two.safetensors")


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    save_file(weights(), tmp_path / "m.safetensors")

    def denied(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    # Permissions do not stop a test that runs as root.
    monkeypatch.setattr(mapped_file.Path, "open", denied)
    refused(tmp_path / "m.safetensors", "cannot be read: Permission denied")
