"""A checkpoint file is whole or refused: cut off at any byte or with any bit flipped, it changes nothing."""

import pathlib
import random
import zipfile

import pytest
import torch
from torch import nn

import schatten
from schatten.checkpoint_file import CHUNK, COMMENT_BYTES
from tests.contracts.test_checkpoint_resume import assert_same_state

CASES = 500


def trained(seed=0, shape=(6, 4)):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in (shape, (5,))]
    opt = schatten.Muon([{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}], lr=0.1 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    opt.step()
    return opt, params


@pytest.fixture
def path(tmp_path):
    return tmp_path / "opt.pt"


def test_what_was_saved_is_loaded(path):
    opt, _ = trained()
    schatten.save(opt, path)
    other, _ = trained(seed=1)
    schatten.load(other, str(path))
    assert_same_state(other.state_dict(), opt.state_dict())


def test_torch_and_zip_tools_read_the_file_as_any_other_of_torch(path):
    opt, _ = trained()
    schatten.save(opt, path)
    for options in ({}, {"mmap": True}):
        assert_same_state(torch.load(path, weights_only=True, **options), opt.state_dict())
    assert zipfile.ZipFile(path).testzip() is None


def test_a_file_of_many_chunks_is_read_whole(path):
    opt, _ = trained(shape=(600, 500))
    schatten.save(opt, path)
    assert path.stat().st_size > CHUNK
    other, _ = trained(seed=1, shape=(600, 500))
    schatten.load(other, path)
    assert_same_state(other.state_dict(), opt.state_dict())
    whole = bytearray(path.read_bytes())
    whole[CHUNK + 1000] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="was changed"):
        schatten.load(other, path)


def damaged(whole):
    """1000 damaged copies: half cut off at a byte, half with a bit flipped, ends and the digest's bytes among them."""
    draw = random.Random(0)
    ends = [0, 1, 2, len(whole) - 1, len(whole) - COMMENT_BYTES, len(whole) - COMMENT_BYTES - 1]
    for length in ends + [draw.randrange(len(whole)) for _ in range(CASES - len(ends))]:
        yield whole[:length]
    last = [8 * (len(whole) - n) + draw.randrange(8) for n in range(1, COMMENT_BYTES + 30)]
    for bit in last + [draw.randrange(8 * len(whole)) for _ in range(CASES - len(last))]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def test_a_thousand_files_cut_off_or_with_a_flipped_bit_are_refused_and_change_nothing(path):
    schatten.save(trained()[0], path)
    whole = path.read_bytes()
    opt, params = trained(seed=1)
    weights, state = [p.detach().clone() for p in params], opt.state_dict()
    state = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state)
    count = 0
    for data in damaged(whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"opt\.pt (does not end with a digest|was changed)"):
            schatten.load(opt, path)
        count += 1
    assert count == 2 * CASES
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert_same_state(opt.state_dict(), state)
    # The last guard against a test that passes because nothing loads.
    path.write_bytes(whole)
    schatten.load(opt, path)


def test_a_plain_file_of_torch_is_refused_with_the_way_it_loads(path):
    opt, _ = trained()
    torch.save(opt.state_dict(), path)
    other, _ = trained(seed=1)
    with pytest.raises(ValueError, match=r"opt.load_state_dict\(torch.load\(path, weights_only=True\)\)"):
        schatten.load(other, path)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert_same_state(other.state_dict(), opt.state_dict())


def test_a_whole_file_of_another_optimizer_is_refused_as_load_state_dict_does(path):
    schatten.save(schatten.Muon([nn.Parameter(torch.zeros(3, 3))]), path)
    with pytest.raises(ValueError, match="1 parameter groups, this optimizer 2"):
        schatten.load(trained()[0], path)


def test_a_missing_file_is_a_missing_file(path):
    with pytest.raises(FileNotFoundError):
        schatten.load(trained()[0], path)


def test_a_crash_while_saving_leaves_the_old_file_and_no_other(path, monkeypatch):
    opt, _ = trained()
    schatten.save(opt, path)
    old = path.read_bytes()

    def half(state_dict, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        schatten.save(opt, path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


def test_the_new_file_takes_the_old_one_s_place_at_once_when_it_is_whole(path, monkeypatch):
    schatten.save(trained()[0], path)
    old, replace = path.read_bytes(), pathlib.Path.replace
    seen = []

    def watched(self, target):
        seen.append((path.read_bytes(), torch.load(self, weights_only=True)["param_groups"][0]["lr"]))
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", watched)
    schatten.save(trained(seed=1)[0], path)
    assert seen == [(old, 1.1)]


def test_saving_replaces_a_file_and_keeps_the_user_s_permissions(path):
    (plain := path.with_name("plain")).write_bytes(b"")
    for seed in (0, 1):
        schatten.save(trained(seed)[0], path)
    assert path.stat().st_mode == plain.stat().st_mode
    assert torch.load(path, weights_only=True)["param_groups"][0]["lr"] == 1.1
