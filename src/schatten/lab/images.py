"""Labelled images: scikit-learn's digits, which ship with it, IDX and CIFAR-10 files, or a Hugging Face dataset."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schatten.lab import cifar_file, hf_images, idx_file
from schatten.lab.errors import InputError

EMBEDDED = "digits"

# Of the embedded digits, which bring no split of their own.
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Images:
    """fp32 pixels in [-1, 1], (count, channels, height, width), and int64 labels 0 .. classes-1."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(np.ascontiguousarray(part.numpy()).tobytes())
        return digest.hexdigest()[:16]


def load(source: str = EMBEDDED) -> Images:
    """Read `source`.

    `"digits"`: scikit-learn's 1,797 images of 8 x 8. A folder with MNIST's IDX files (`lab.idx_file`; of `t10k` files alone
    the first 80 % are for training) or with CIFAR-10's batches (`lab.cifar_file`). `hf:NAME`: a dataset of the `datasets`
    library with a column of images and one of class labels (`lab.hf_images`).

    Raises InputError for what is missing, damaged or truncated, by name.
    """
    if source == EMBEDDED:
        return _digits()
    if source.startswith("hf:"):
        return _images(source, *hf_images.read(source.removeprefix("hf:")))
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(f"--data {source} is no folder: give one of IDX or CIFAR-10 files, hf:NAME or '{EMBEDDED}'.")
    if idx_file.holds(folder):
        return _images(source, *idx_file.read(folder), idx_file.CLASSES)
    if cifar_file.holds(folder):
        return _images(source, *cifar_file.read(folder), cifar_file.CLASSES)
    raise InputError(
        f"--data {source} has neither IDX files (such as train-images-idx3-ubyte.gz) nor CIFAR-10 batches (data_batch_1)."
    )


def _images(source: str, train: idx_file.Labelled, test: idx_file.Labelled, classes: int) -> Images:
    (train_pixels, train_labels), (test_pixels, test_labels) = train, test
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        raise InputError(f"{source} has training images of {train_pixels.shape[1:]}, but tests of {test_pixels.shape[1:]}.")
    train_part, test_part = (torch.from_numpy(pixels).float().div_(127.5).sub_(1) for pixels in (train_pixels, test_pixels))
    train_classes, test_classes = (torch.from_numpy(labels).long() for labels in (train_labels, test_labels))
    return Images(train_part, train_classes, test_part, test_classes, classes, source)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 8 - 1).float().reshape(-1, 1, 8, 8)
    # Shuffled once, by a seed of its own: neighbours are by the same writer.
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    images, classes = images[order], torch.from_numpy(labels).long()[order]
    cut = int(TEST_SHARE * len(images))
    return Images(images[cut:], classes[cut:], images[:cut], classes[:cut], 10, EMBEDDED)
