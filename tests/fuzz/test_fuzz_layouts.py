"""Layouts of any options and shapes: the blocks are all of a parameter, each entry once, or the layout is refused by name."""

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from schatten import Layout
from schatten.layout import Piece, pieces, resolve
from tests.fuzz.invariants import assert_named, fuzz, refusal
from tests.fuzz.strategies import ANY_LAYOUT, Read, fitting, shapes
from tests.fuzz.tensors import STRIDES, laid_out

NAME = "'blocks.0.w'"


def assert_partition(layout: str | Layout, shape: tuple[int, ...], strides: str) -> tuple[Piece, ...]:
    """Reading gives every entry once, writing to the views puts each back where it was read, whatever the strides."""
    places = laid_out(torch.arange(math.prod(shape)).view(shape), strides)
    found = pieces(layout, shape, NAME)
    blocks = [piece.of(places) for piece in found]
    assert [tuple(block.shape) for block in blocks] == [piece.blocks for piece in found]
    read = torch.cat([block.reshape(-1) for block in blocks])
    assert read.sort().values.tolist() == list(range(math.prod(shape)))
    written = laid_out(torch.full(shape, -1), strides)
    for piece, block in zip(found, blocks, strict=True):
        view = piece.view(written)
        assert view.numel() == 0 or view.untyped_storage().data_ptr() == written.untyped_storage().data_ptr()
        view.copy_(block.reshape(view.shape))
    assert torch.equal(written, places)
    return found


@fuzz("fitting layouts", read=fitting(), strides=st.sampled_from(STRIDES))
def test_a_layout_that_fits_reads_and_writes_every_entry_once(read: Read, strides: str):
    for shape in read.shapes:
        found = assert_partition(read.layout, shape, strides)
        full = read.layout if isinstance(read.layout, Layout) else Layout(read.layout)
        if full.kind not in ("flat", "auto") and len(shape) == 2:
            # Rows of all blocks side by side, or columns, are those of the matrix.
            rows, columns = shape[::-1] if full.transpose else shape
            cut, kept = (1, columns) if full.axis == "fan_out" else (2, rows)
            assert all(piece.blocks[3 - cut] == kept for piece in found)
            assert sum(piece.blocks[0] * piece.blocks[cut] for piece in found) == (rows if cut == 1 else columns)
        assert resolve(resolve(read.layout, shape, NAME), shape, NAME) == resolve(read.layout, shape, NAME)


@fuzz("any layouts", layout=ANY_LAYOUT, shape=shapes(), strides=st.sampled_from(STRIDES))
def test_any_layout_on_any_shape_is_a_partition_or_is_refused_by_the_parameters_name(layout, shape, strides):
    try:
        resolve(layout, shape, NAME)
    except ValueError as error:
        assert_named(error, [NAME])
        return
    assert_partition(layout, shape, strides)


ODD = (0, -1, 1.5, True, None, "2", (), (0,), (2, -1), (1, True), [2, 0], math.nan, {2, 3})
WRONG: dict[str, tuple[Any, ...]] = {
    "kind": ("linear", "", None, 3, ("conv",), ["conv"]),
    "split": ODD,
    "heads": (*ODD, (1,) * 9),
    "groups": (*ODD, (2,)),
    "axis": ("rows", None, 0, ["fan_out"]),
    "transpose": (1, 0, None, "yes"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=repr)
def test_an_option_that_makes_no_layout_is_refused_by_its_name(key, value):
    with refusal("layout" if key == "kind" else key):
        Layout(**{"kind": "conv", "split": 3, key: value})


@pytest.mark.parametrize("options", [{"split": 2}, {"heads": 2}, {"groups": 2}, {"transpose": True}], ids=str)
def test_a_flat_layout_takes_no_cuts(options):
    with refusal("flat"):
        Layout("flat", **options)
