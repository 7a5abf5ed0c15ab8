"""Expert banks: one parameter that holds a matrix for each expert, and in which order its axes and rows are."""

import re
from dataclasses import dataclass
from itertools import product

from schatten.layout import Layout
from schatten.routing.places import Place
from schatten.routing.sizes import EXPERTS, classes, linear_sizes, number

# What maps the model's width onto the experts' own, and back.
UP = ("w1", "w3", "v1", "wi", "wi_0", "wi_1", "up_proj", "gate_proj", "up", "gate")

DOWN = ("w2", "wo", "down_proj", "down")

FUSED = ("gate_up_proj", "gate_up", "w13", "w1_w3")

# Banks whose gate and up rows alternate, of versions of transformers that do not say so.
INTERLEAVED = ("GptOssExperts",)


@dataclass(frozen=True)
class Bank:
    """What a bank holds and its layout, None where its module does not say which axis is which."""

    what: str
    layout: Layout | None


def bank(place: Place) -> Bank | None:
    """A parameter as an expert bank, None for any other."""
    module, shape = place.module, tuple(place.parameter.shape)
    experts = number(module, *EXPERTS)
    name = _plain(place.attribute)
    if experts and "DbrxExpertGLU" in classes(module) and name in (*UP, *DOWN):
        # DBRX stacks its experts along the rows, and multiplies by w2 from the other side.
        cut = Layout("matrix", split=experts) if name in UP else Layout("matrix", split=experts, axis="fan_in", transpose=True)
        return Bank("expert bank", cut)
    if len(shape) != 3 or (shape[0] != experts and not any("expert" in c.lower() for c in classes(module))):
        return None
    if place.attribute == "weight":
        sizes = linear_sizes(module)
        return Bank("expert bank", Layout("experts")) if sizes == shape[1:] else None
    if name not in (*UP, *DOWN, *FUSED):
        return None
    transposed = _transposed(place, name)
    if transposed is None:
        return Bank("expert bank", None)
    if name not in FUSED:
        return Bank("expert bank", Layout("experts", transpose=transposed))
    rows = shape[2] if transposed else shape[1]
    concatenated = getattr(module, "is_concatenated", not any(c in INTERLEAVED for c in classes(module)))
    if concatenated:
        return Bank("expert bank: gate, up", Layout("experts", split=2, transpose=transposed))
    return Bank("expert bank: gate, up in turn", Layout("experts", split=2, groups=rows // 2, transpose=transposed))


def _transposed(place: Place, name: str) -> bool | None:
    """Whether a bank is stored as (experts, fan_in, fan_out): said by the module, or told by the sizes around it."""
    module, (_, first, second) = place.module, tuple(place.parameter.shape)
    if isinstance(said := getattr(module, "is_transposed", None), bool):
        return said
    banks = {_plain(attribute): tuple(p.shape) for attribute, p in module.named_parameters(recurse=False) if p.ndim == 3}
    for up, down in product(FUSED, DOWN):
        if up in banks and down in banks:
            # (experts, 2 f, d) and (experts, d, f), or (experts, d, 2 f) and (experts, f, d): never both.
            (_, rows, columns), (_, out, into) = banks[up], banks[down]
            if (rows, columns) == (2 * into, out):
                return False
            return True if (columns, rows) == (2 * out, into) else None
    width = _width(place)
    if width is None or (first == width) == (second == width):
        return None
    return (first == width) == (name not in DOWN)


def _plain(attribute: str) -> str:
    return re.sub(r"_weights?$", "", attribute)


def _width(place: Place) -> int | None:
    """The model's width, which the router reads: said by the bank, or the fan_in of a Linear onto as many experts."""
    if (said := number(place.module, "hidden_size", "dim", "d_model", "embed_dim")) is not None:
        return said
    experts = place.parameter.shape[0]
    for module in place.block.modules() if place.block is not None else ():
        sizes = linear_sizes(module)
        if sizes is not None and sizes[0] == experts:
            return sizes[1]
    return None
