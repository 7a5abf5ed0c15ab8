"""Layouts: how one parameter is read as a batch of logical matrices (blocks, fan_out, fan_in)."""

import math

LAYOUTS = ("auto", "matrix", "conv", "experts", "flat")


def resolve(layout: str, shape: tuple[int, ...], name: str) -> str:
    """The layout that `"auto"` stands for, after checking that `shape` fits it; errors name the parameter.

    `matrix` is (fan_out, fan_in); `conv` reads (out, in, *kernel) as one matrix out x (in * kernel); `experts` reads
    (*banks, fan_out, fan_in) as a batch of matrices; `flat` reads any tensor as one row, for maps that act on entries or on
    the whole. `auto` is `matrix` in two dimensions and `conv` in four or five;
    three dimensions are a 1-D convolution or a bank of matrices, so there the choice must be written.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}.")
    if layout == "flat":
        return layout
    if len(shape) < 2:
        raise ValueError(
            f"A spectral rule needs matrices, but {name} has shape {tuple(shape)}. Pass the model itself, which routes "
            f"such parameters to AdamW, or put it into a group with algorithm='adamw'."
        )
    if layout == "auto":
        if len(shape) == 3:
            raise ValueError(
                f"{name} of shape {tuple(shape)} may be a 1-D convolution or a bank of matrices: put it into a group "
                f"with layout='conv' or layout='experts'."
            )
        return "matrix" if len(shape) == 2 else "conv"
    if layout == "matrix" and len(shape) != 2:
        raise ValueError(f"layout 'matrix' needs two dimensions, but {name} has shape {tuple(shape)}; try 'conv' or 'experts'.")
    return layout


def blocks(layout: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(blocks, fan_out, fan_in) of a parameter of `shape` under a resolved layout."""
    if layout == "experts":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    if layout == "flat":
        return 1, 1, math.prod(shape)
    return 1, shape[0], math.prod(shape[1:])
