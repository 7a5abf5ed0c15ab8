"""Labelled images of a Hugging Face dataset: one column of images, one of class labels, found by their types."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from schatten.lab.errors import InputError

# Of a dataset without a test part of its own.
TEST_SHARE = 0.2

Labelled = tuple[np.ndarray, np.ndarray]


def read(name: str) -> tuple[Labelled, Labelled, int]:
    """Training and test images (count, channels, height, width) with labels, uint8 and int64, and the number of classes.

    Tests are on the split `test`, else `validation`, else a fifth drawn by a fixed seed. Raises InputError for a dataset
    that cannot be loaded, without such columns, or with images of several sizes.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"hf:{name} needs the datasets library: pip install 'schatten[hf]'.") from None
    try:
        splits: Any = datasets.load_dataset(name)
    except Exception as error:  # the library's errors have no common class; any of them means no data
        raise InputError(f"hf:{name} could not be loaded: {str(error).splitlines()[0]}") from None
    if "train" not in splits:
        raise InputError(f"hf:{name} has no split 'train', but {sorted(splits)}.")
    features = splits["train"].features
    image, label = (_column(name, features, kind) for kind in (datasets.Image, datasets.ClassLabel))
    test = next((part for part in ("test", "validation") if part in splits), None)
    train = _labelled(name, splits["train"], image, label)
    if test is not None:
        return train, _labelled(name, splits[test], image, label), features[label].num_classes
    # Folders of images come class by class, so the two parts are drawn, not cut.
    order = np.random.default_rng(0).permutation(len(train[1]))
    cut = max(1, int(TEST_SHARE * len(order)))
    held, kept = order[:cut], order[cut:]
    return (train[0][kept], train[1][kept]), (train[0][held], train[1][held]), features[label].num_classes


def _column(name: str, features: Any, kind: type) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if not found:
        raise InputError(f"hf:{name} has no column of type {kind.__name__}, but {', '.join(features)}.")
    return found[0]


def _labelled(name: str, rows: Any, image: str, label: str) -> Labelled:
    labels = np.array(rows[label], dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0:
        raise InputError(f"hf:{name} has rows without a label, which -1 stands for, or no rows at all.")
    encoded = rows.cast_column(image, type(rows.features[image])(decode=False))
    pictures = [_picture(name, entry, index) for index, entry in enumerate(encoded[image])]
    grey = all(picture.mode in ("1", "L") for picture in pictures)
    arrays = [np.asarray(picture.convert("L" if grey else "RGB")) for picture in pictures]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise InputError(
            f"hf:{name} has images of several sizes, such as {shapes[0]} and {shapes[1]}: scale them to one first."
        )
    pixels = np.stack(arrays)
    return (pixels[:, None] if grey else pixels.transpose(0, 3, 1, 2)), labels


def _picture(name: str, entry: Mapping[str, Any], index: int) -> Any:
    """An image of its bytes, which lie in the data set or in a file; the library would leave files of damaged ones open."""
    from PIL import Image

    try:
        content = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except Exception as error:  # Pillow raises by format: OSError, SyntaxError and others
        raise InputError(f"hf:{name} has a damaged image in row {index}: {str(error).splitlines()[0]}") from None
    return picture
