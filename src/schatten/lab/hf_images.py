"""Labelled images of a Hugging Face dataset: one column of images, one of class labels, found by their types."""

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
    grey = all(picture.mode in ("1", "L") for picture in rows[image])
    pictures = [np.asarray(_decoded(name, i, picture, grey)) for i, picture in enumerate(rows[image])]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise InputError(f"hf:{name} has images of several sizes, such as {sorted(shapes)[:2]}: scale them to one first.")
    pixels = np.stack(pictures)
    return (pixels[:, None] if grey else pixels.transpose(0, 3, 1, 2)), labels


def _decoded(name: str, index: int, picture: Any, grey: bool) -> Any:
    try:
        return picture.convert("L" if grey else "RGB")
    except OSError as error:  # Pillow's word for a damaged or truncated file
        raise InputError(f"hf:{name} has a damaged image in row {index}: {error}") from None
