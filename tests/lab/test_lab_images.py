"""Labelled images: what loads, and that damaged, truncated and hostile files are refused by name."""

import gzip
import os
import pickle
import pickletools
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from schatten.lab import images
from schatten.lab.cifar_file import TEST, TRAIN
from schatten.lab.errors import InputError

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 10, count, dtype=np.uint8)


def check_range(data):
    """Pixels 0 and 255 become -1 and 1."""
    for part in (data.train, data.test):
        assert part.dtype == torch.float32 and -1 <= part.min() and part.max() <= 1
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64


# -- the embedded digits -----------------------------------------------------------------------------------------------


def test_the_digits_load_without_files_and_are_the_same_every_time():
    data = images.load()
    assert data.shape == (1, 8, 8) and data.classes == 10
    assert len(data.train) + len(data.test) == len(data.train_labels) + len(data.test_labels) == 1797
    check_range(data)
    assert data.fingerprint == images.load("digits").fingerprint


# -- IDX ---------------------------------------------------------------------------------------------------------------


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, part, images, labels, end=".gz"):
    pack = gzip.compress if end else bytes
    (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
    (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_files_load_as_they_were_written(tmp_path, end):
    train, test = pixels(20, 5, 4), pixels(6, 5, 4, seed=1)
    train[0, 0, :2] = (0, 255)
    write_idx(tmp_path, "train", train, labels(20), end)
    write_idx(tmp_path, "t10k", test, labels(6, seed=1), end)
    data = images.load(str(tmp_path))
    assert data.shape == (1, 5, 4) and data.classes == 10
    # A pixel is k / 127.5 - 1 in fp32.
    torch.testing.assert_close((data.train[:, 0] + 1) * 127.5, torch.from_numpy(train).float(), rtol=0, atol=1e-4)
    torch.testing.assert_close((data.test[:, 0] + 1) * 127.5, torch.from_numpy(test).float(), rtol=0, atol=1e-4)
    assert data.train[0, 0, 0, :2].tolist() == [-1, 1]
    assert data.train_labels.tolist() == labels(20).tolist() and data.test_labels.tolist() == labels(6, seed=1).tolist()
    check_range(data)


def test_of_test_files_alone_the_first_four_fifths_are_for_training(tmp_path):
    write_idx(tmp_path, "t10k", pixels(10, 3, 3), labels(10))
    data = images.load(str(tmp_path))
    assert (len(data.train), len(data.test)) == (8, 2)
    assert [*data.train_labels.tolist(), *data.test_labels.tolist()] == labels(10).tolist()


@pytest.mark.skipif(not MNIST.exists(), reason="needs ../shared/data/mnist, which only some checkouts have")
def test_the_mnist_test_set_loads_with_every_digit():
    data = images.load(str(MNIST))
    assert data.shape == (1, 28, 28) and (len(data.train), len(data.test)) == (8000, 2000)
    assert torch.cat([data.train_labels, data.test_labels]).bincount().tolist() == MNIST_COUNTS
    check_range(data)


# Of the ten digits in the 10,000 test images.
MNIST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]

GOOD_IMAGES, GOOD_LABELS = idx(pixels(6, 3, 3)), idx(labels(6))
LABELS_OUT_OF_RANGE = idx(np.array([0, 1, 2, 3, 4, 10], dtype=np.uint8))


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("images", b"", "begins with nothing, IDX images with 00000803"),
        ("images", GOOD_LABELS, "begins with 00000801, IDX images with 00000803"),
        ("labels", GOOD_IMAGES, "begins with 00000803, IDX labels with 00000801"),
        ("images", b"\0\0\x0d\x03" + GOOD_IMAGES[4:], "begins with 00000d03"),
        ("images", GOOD_IMAGES[:9], "ends within its header, after 9 bytes"),
        ("images", GOOD_IMAGES[:-1], "has 53 bytes of data, its header says 6 x 3 x 3 = 54"),
        ("images", GOOD_IMAGES + b"\0", "has more than 54 bytes of data"),
        ("images", GOOD_IMAGES[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"x" * 9, "has 9 bytes of data"),
        ("images", idx(pixels(0, 3, 3)), r"sizes \(0, 3, 3\) in its header: it is empty"),
        ("images", idx(pixels(5, 3, 3)), "has 5 images, but train-labels-idx1-ubyte.* has 6 labels"),
        ("labels", LABELS_OUT_OF_RANGE, "has a label 10: labels are 0 .. 9"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_damaged_idx_file_is_refused_by_its_name(tmp_path, broken, content, message, end):
    write_idx(tmp_path, "train", pixels(6, 3, 3), labels(6), end)
    write_idx(tmp_path, "t10k", pixels(6, 3, 3), labels(6), end)
    file = tmp_path / f"train-{broken}-idx{3 if broken == 'images' else 1}-ubyte{end}"
    file.write_bytes(gzip.compress(content) if end else content)
    with pytest.raises(InputError, match=rf"train-{broken}-idx.*{message}"):
        images.load(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-12],  # no end of the stream
        lambda packed: packed[: len(packed) // 2],
        lambda packed: packed[:40] + bytes(b ^ 0xFF for b in packed[40:60]) + packed[60:],
        lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:],  # another checksum
        lambda packed: GOOD_IMAGES,  # never compressed
    ],
)
def test_a_damaged_gzip_file_is_refused_by_its_name(tmp_path, damage):
    write_idx(tmp_path, "t10k", pixels(50, 3, 3), labels(50))
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz"):
        images.load(str(tmp_path))


def test_an_idx_file_that_is_missing_or_of_other_sizes_is_named(tmp_path):
    write_idx(tmp_path, "train", pixels(6, 3, 3), labels(6))
    with pytest.raises(InputError, match="no t10k-images-idx3-ubyte, plain or"):
        images.load(str(tmp_path))
    write_idx(tmp_path, "t10k", pixels(6, 3, 4), labels(6))
    with pytest.raises(InputError, match=r"training images of \(1, 3, 3\), but tests of \(1, 3, 4\)"):
        images.load(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="no t10k-labels-idx1-ubyte, plain or"):
        images.load(str(tmp_path))


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def pickled(count, seed=0, protocol=2):
    """A batch as the archive has them: protocol 2 and byte strings for keys."""
    batch = {b"data": pixels(count, 3072, seed=seed), b"labels": labels(count, seed).tolist(), b"batch_label": b"one of 5"}
    return pickle.dumps(batch, protocol=protocol)


def python_2(count):
    """A batch with the opcodes that Python 2 and numpy of its time wrote: strings of bytes, numpy.core.multiarray."""
    data, out = pixels(count, 3072), bytearray(b"\x80\x02}q\x01(")

    def text(value):
        return (b"U" + bytes((len(value),)) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value

    out += (
        text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
    )
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R"
        + b"(K\x03"
        + text(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    out += b"(K\x01" + b"M" + struct.pack("<H", count) + b"M\x00\x0c\x86" + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    out += text(b"labels") + b"](" + b"".join(b"K" + bytes((int(n),)) for n in labels(count)) + b"e" + b"u."
    return bytes(out)


def write_cifar(folder, content=pickled, end=""):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate((*TRAIN, TEST)):
        (folder / f"{name}{end}").write_bytes(content(4, seed=i))
    return folder


def binary(count, seed=0):
    return np.concatenate([labels(count, seed)[:, None], pixels(count, 3072, seed=seed)], 1).tobytes()


@pytest.mark.parametrize("end", ["", ".bin"])
@pytest.mark.parametrize("below", [None, "cifar-10-batches-py"])
def test_both_versions_of_cifar_are_the_same_images(tmp_path, end, below):
    write_cifar(tmp_path / below if below else tmp_path, binary if end else pickled, end)
    data = images.load(str(tmp_path))
    assert data.shape == (3, 32, 32) and data.classes == 10 and (len(data.train), len(data.test)) == (20, 4)
    expected = np.concatenate([pixels(4, 3, 32, 32, seed=i) for i in range(5)])
    torch.testing.assert_close((data.train + 1) * 127.5, torch.from_numpy(expected).float(), rtol=0, atol=1e-4)
    assert data.train_labels[-4:].tolist() == labels(4, 4).tolist() and data.test_labels.tolist() == labels(4, 5).tolist()
    check_range(data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_of_every_protocol_load(tmp_path, protocol):
    write_cifar(tmp_path, lambda count, seed: pickled(count, seed, protocol))
    assert images.load(str(tmp_path)).test_labels.tolist() == labels(4, 5).tolist()


def test_batches_written_by_python_2_load(tmp_path):
    with warnings.catch_warnings():
        # numpy's present name of the module that such files ask for.
        warnings.simplefilter("ignore")
        ordinary = pickle.loads(python_2(4), encoding="bytes")
    assert np.array_equal(ordinary[b"data"], pixels(4, 3072)) and ordinary[b"labels"] == labels(4).tolist()
    write_cifar(tmp_path, lambda count, seed: python_2(count))
    data = images.load(str(tmp_path))
    torch.testing.assert_close((data.test + 1) * 127.5, torch.from_numpy(pixels(4, 3, 32, 32)).float(), rtol=0, atol=1e-4)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def batch(**changes):
    return pickle.dumps({b"data": pixels(4, 3072), b"labels": [1, 2, 3, 4]} | {k.encode(): v for k, v in changes.items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (b"not a pickle", "is no batch of CIFAR-10"),
        (pickled(4)[:-1], "is no batch of CIFAR-10, or damaged or cut off"),
        (pickled(4)[:5000], "is no batch of CIFAR-10, or damaged or cut off"),
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({b"labels": [1]}), r"'data' must be count x 3072 bytes"),
        (batch(data=pixels(4, 3071)), "'data' must be"),
        (batch(data=pixels(4, 3072).astype(np.int64)), "'data' must be"),
        (batch(data=b"x" * 4 * 3072), "'data' must be"),
        (batch(data=np.array([None, {}], dtype=object)), "'data' must be"),
        (batch(data=pixels(0, 3072)), "'data' must be"),
        (batch(labels=[1, 2, 3]), "has 4 images, but 3 labels"),
        (batch(labels=[1, 2, 3, 10]), "has a label 10: labels are 0 .. 9"),
        (batch(labels=[1, 2, 3, -1]), "has a label -1"),
        (batch(labels=[1, 2, 3, "4"]), "'labels' must be a list of whole numbers"),
        (batch(labels=7), "'labels' must be a list"),
        (pickled(3), "has 3 images, other batches 4: it was cut off"),
        (python_2(4).replace(b"T" + struct.pack("<i", 4 * 3072), b"T" + struct.pack("<i", 2**31 - 1)), "damaged or cut off"),
    ],
)
def test_what_is_no_batch_is_refused_by_its_name(tmp_path, content, message):
    (write_cifar(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(InputError, match=rf"data_batch_3.*{message}"):
        images.load(str(tmp_path))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {trace}",)),
        (eval, ("open({trace!r}, 'w')",)),
        (subprocess.call, (["touch", "trace"],)),
        (pickle.loads, (b"cos\ngetpid\n)R.",)),
        (np.load, ("{trace}",)),
        (torch.load, ("{trace}",)),
    ],
)
@pytest.mark.parametrize("place", ["alone", "data", "labels"])
def test_a_hostile_pickle_runs_nothing_and_leaves_no_trace(tmp_path, function, arguments, place):
    trace = tmp_path / "trace"
    filled = tuple(a.format(trace=str(trace)) if isinstance(a, str) else a for a in arguments)
    call = Call(function, *filled)
    content = pickle.dumps(call) if place == "alone" else batch(**{place: call})
    (write_cifar(tmp_path / "cifar") / TEST).write_bytes(content)
    with pytest.raises(InputError, match=rf"{TEST}.*asks for .*which is code, not images\. Nothing was run\."):
        images.load(str(tmp_path / "cifar"))
    assert not trace.exists()


def test_what_a_pickle_does_to_the_names_it_may_use_ends_with_it(tmp_path):
    # BUILD sets attributes of what is on the stack: here of the stand-in for numpy's dtype.
    (write_cifar(tmp_path) / TEST).write_bytes(b"\x80\x02cnumpy\ndtype\n}(X\x01\x00\x00\x00aK\x01ub.")
    before = vars(np.dtype).keys()
    with pytest.raises(InputError, match=TEST):
        images.load(str(tmp_path))
    assert vars(np.dtype).keys() == before and not hasattr(np.dtype, "a")
    (tmp_path / TEST).write_bytes(pickled(4, 5))
    assert len(images.load(str(tmp_path)).test) == 4


def test_a_pickle_cut_anywhere_is_refused(tmp_path):
    whole = pickled(4)
    write_cifar(tmp_path)
    # After each of its opcodes, and a byte later.
    ends = [place for _, _, place in pickletools.genops(whole) if place]
    for end in sorted({*ends, *(e + 1 for e in ends)} - {len(whole)}):
        (tmp_path / TEST).write_bytes(whole[:end])
        with pytest.raises(InputError, match=TEST):
            images.load(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, not whole records of 3073"),
        (binary(4)[:-1], "has 12291 bytes, not whole records"),
        (binary(3), "has 3 images, other batches 4: it was cut off"),
        (b"\x0a" + binary(4)[1:], "has a label 10"),
    ],
)
def test_a_damaged_binary_batch_is_refused_by_its_name(tmp_path, content, message):
    (write_cifar(tmp_path, binary, ".bin") / "data_batch_2.bin").write_bytes(content)
    with pytest.raises(InputError, match=rf"data_batch_2\.bin {message}"):
        images.load(str(tmp_path))


def test_a_missing_batch_is_named(tmp_path):
    (write_cifar(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(InputError, match="no data_batch_4"):
        images.load(str(tmp_path))


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def write_pictures(folder, counts, size=(6, 5), mode="L"):
    from PIL import Image

    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for i in range(count):
            shape = size[::-1] if mode == "L" else (*size[::-1], 3)
            Image.fromarray(pixels(1, *shape, seed=i)[0]).save(folder / label / f"{i}.png")


def test_a_hugging_face_dataset_of_pictures_loads_by_name(tmp_path):
    pytest.importorskip("datasets", reason="needs schatten[hf]")
    write_pictures(tmp_path / "train", {"cat": 3, "dog": 2}, mode="RGB")
    write_pictures(tmp_path / "test", {"cat": 1, "dog": 1}, mode="RGB")
    data = images.load(f"hf:{tmp_path}")
    assert data.shape == (3, 5, 6) and data.classes == 2
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    expected = torch.from_numpy(pixels(1, 5, 6, 3, seed=2)[0]).permute(2, 0, 1).float()
    torch.testing.assert_close((data.train[2] + 1) * 127.5, expected, rtol=0, atol=1e-4)


def test_a_dataset_without_tests_is_drawn_apart_and_broken_ones_are_named(tmp_path):
    pytest.importorskip("datasets", reason="needs schatten[hf]")
    write_pictures(tmp_path / "one", {"a": 5, "b": 5})
    data = images.load(f"hf:{tmp_path}/one")
    assert data.shape == (1, 5, 6) and (len(data.train), len(data.test)) == (8, 2)
    write_pictures(tmp_path / "two", {"a": 2, "b": 1})
    cut = next((tmp_path / "two" / "b").glob("*.png"))
    cut.write_bytes(cut.read_bytes()[:50])
    with pytest.raises(InputError, match=f"hf:{tmp_path}/two has a damaged image in row 2"):
        images.load(f"hf:{tmp_path}/two")
    write_pictures(tmp_path / "three" / "train", {"a": 2, "b": 1})
    write_pictures(tmp_path / "three" / "test", {"a": 1, "b": 1}, size=(4, 4))
    with pytest.raises(InputError, match=r"training images of \(1, 5, 6\), but tests of \(1, 4, 4\)"):
        images.load(f"hf:{tmp_path}/three")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("no pictures")
    with pytest.raises(InputError, match="texts has no column of type Image, but text"):
        images.load(f"hf:{tmp_path}/texts")


# -- anything else -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing", "missing is no folder"),
        (lambda path: path.joinpath("file").write_bytes(GOOD_IMAGES) and path / "file", "file is no folder"),
        (lambda path: path, "neither IDX files .* nor CIFAR-10 batches"),
        (lambda path: "hf:/nowhere/at/all", "hf:/nowhere/at/all"),
    ],
)
def test_what_holds_no_images_is_refused_by_name(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        images.load(str(make(tmp_path)))
