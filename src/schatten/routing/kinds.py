"""What a parameter is: its route, its matrices and the reason, from the module that owns it and the one around.

One function for each kind of thing, asked in turn by `kind`; docs/routing.md gives the table with the evidence.
"""

import re
from dataclasses import dataclass, replace

from torch import nn

from schatten.layout import Layout, pieces
from schatten.routing.experts import bank
from schatten.routing.fused import cut
from schatten.routing.places import Place
from schatten.routing.sizes import EXPERTS, class_name, classes, is_conv1d, linear_sizes, number

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

# timm's Muon leaves matrices with a dimension below 4 to AdamW too: of so few directions there is no spectrum to flatten.
SMALLEST = 4

# Gates stacked along the rows of a recurrent weight.
GATES = ((nn.LSTM, 4), (nn.LSTMCell, 4), (nn.GRU, 3), (nn.GRUCell, 3))


@dataclass(frozen=True)
class Kind:
    """`route` is None where it is not known; `layout` is how a spectral rule would read the parameter, if that is."""

    route: str | None
    reason: str
    layout: Layout | None = None


def is_table(module: nn.Module) -> bool:
    """Whether a module looks rows up by their index: an embedding of torch, or by the sizes or name of another library's."""
    if isinstance(module, EMBEDDINGS) or (hasattr(module, "num_embeddings") and hasattr(module, "embedding_dim")):
        return True
    return class_name(module).endswith("Embedding") and linear_sizes(module) is None


def kind(place: Place) -> Kind:
    """The kind of a parameter that is neither a table nor a head."""
    for found in (_norm, _vector, _adapter, _router, _weight, _recurrent, _attention, _bank, _named):
        if (answer := found(place)) is not None:
            return _unless_skinny(answer, place)
    return Kind(None, f"{class_name(place.module)}.{place.attribute} is of no known kind")


def _unless_skinny(found: Kind, place: Place) -> Kind:
    if found.route != "spectral":
        return found
    assert found.layout is not None
    sizes = [piece.blocks[1:] for piece in pieces(found.layout, place.parameter.shape)]
    fan_out, fan_in = min(sizes, key=min)
    if min(fan_out, fan_in) >= SMALLEST:
        return found
    return replace(found, route="adamw", reason=f"skinny, {fan_out}x{fan_in}: {found.reason}")


def _norm(place: Place) -> Kind | None:
    what = class_name(place.module)
    if isinstance(place.module, NORMS) or re.search(r"norm(gated)?([123]d)?$", what, re.IGNORECASE):
        return Kind("adamw", f"norm {place.attribute} ({what})")
    return None


def _vector(place: Place) -> Kind | None:
    if place.parameter.ndim == 0:
        return Kind("adamw", "scalar")
    if place.parameter.ndim == 1:
        bias = "bias" in place.attribute
        return Kind("adamw", "bias" if bias else f"vector ({class_name(place.module)}.{place.attribute})")
    return None


def _adapter(place: Place) -> Kind | None:
    """LoRA's factors, of peft or by the names of kohya's scripts."""
    parts = (*place.path, place.attribute)
    for i, part in enumerate(parts):
        if part in ("lora_A", "lora_a", "lora_down"):
            return Kind("adamw", "LoRA A", _own_layout(place))
        if part in ("lora_embedding_A", "lora_embedding_B"):
            return Kind("adamw", "LoRA of an embedding", _own_layout(place))
        if part in ("lora_B", "lora_b", "lora_up"):
            return _lora_b(place, i)
    return None


def _lora_b(place: Place, depth: int) -> Kind | None:
    """B, whose rows are those of the projection it adds to, cut as that is; of a bank, the columns of each expert."""
    own = _own_layout(place)
    if own is None or place.parameter.ndim != 2 or depth >= len(place.path):
        return None if own is None else Kind("spectral", "LoRA B", own)
    layer, (rows, columns) = place.above[depth], place.parameter.shape
    experts = getattr(layer, "num_experts", 1)
    if isinstance(experts, int) and experts > 1:
        layout = Layout("matrix", split=experts, groups=columns // experts, axis="fan_in")
        return Kind("spectral", "LoRA B of each expert", layout)
    sizes = linear_sizes(layer)
    if depth == 0 or sizes is None:
        return Kind("spectral", "LoRA B", own)
    return _projection("LoRA B", place.above[depth - 1], place.path[depth - 1], rows, sizes[1], own)


def _own_layout(place: Place) -> Layout | None:
    """How the parameter is read by its owner's class alone."""
    if isinstance(place.module, nn.modules.conv._ConvNd):
        return Layout("conv")
    return Layout("matrix") if place.parameter.ndim == 2 else None


def _router(place: Place) -> Kind | None:
    """The scores of a mixture's experts, by class or name, or a gate beside experts or with a row for each."""
    owners = [name for m in (place.module, place.block) if m is not None for name in classes(m)]
    named = any(part in ("router", "routers", "gating") for part in place.path)
    routes = any(re.search(r"(Router|TopK_?Gat(e|ing)|MoE_?Gat(e|ing))(MLP)?$", name, re.IGNORECASE) for name in owners)
    if not named and not routes and place.child in ("gate", "wg", "switch") and place.block is not None:
        children = place.block._modules
        # The gate of an expert that all tokens see may stand there too, with its own up and down beside it.
        gated_unit = any(name.startswith(("up", "down")) for name in children)
        beside = any("expert" in name for name in children) and not gated_unit
        routes = beside or number(place.block, *EXPERTS) == place.parameter.shape[0]
    if not named and not routes:
        return None
    return Kind("adamw", f"router ({class_name(place.module)})", _own_layout(place))


def _weight(place: Place) -> Kind | None:
    """The weight of a Linear, of a layer like it or of a convolution, also under weight or spectral norm."""
    attribute, p = place.attribute, place.parameter
    parametrized = place.path[-2:-1] == ("parametrizations",)
    if attribute == "weight_g" or (parametrized and sum(n > 1 for n in p.shape) <= 1):
        return Kind("adamw", "magnitude of a weight norm")
    if parametrized:
        attribute, place = place.path[-1], place.up(len(place.path) - 2)
    if attribute not in ("weight", "weight_v", "weight_orig"):
        return None
    if isinstance(place.module, nn.modules.conv._ConvNd):
        return _convolution(place, place.module)
    sizes = linear_sizes(place.module)
    if sizes is None or p.ndim != 2:
        return None
    transpose = is_conv1d(place.module) or (tuple(p.shape) != sizes and tuple(p.shape) == sizes[::-1])
    if not transpose and tuple(p.shape) != sizes and not isinstance(place.module, nn.Linear):
        return None
    what = "Linear" if isinstance(place.module, nn.Linear) else class_name(place.module)
    own = Layout("matrix", transpose=transpose)
    site = place.up(_depth(place))
    rows, columns = reversed(p.shape) if transpose else p.shape
    if site.block is None:
        return Kind("spectral", f"hidden {what}", own)
    return _projection(f"hidden {what}", site.block, site.child, rows, columns, own)


def _depth(place: Place) -> int:
    """The length of the path without what adapters put between a layer and its block."""
    depth = len(place.path)
    while depth and place.path[depth - 1] == "base_layer":
        depth -= 1
    if place.path[max(depth - 2, 0) : depth - 1] in (("modules_to_save",), ("original_module",)):
        depth -= 2
    return depth


def _projection(what: str, block: nn.Module, child: str, rows: int, columns: int, own: Layout) -> Kind:
    """A matrix of these rows in the place of `block.child`, cut as a fused projection there is."""
    found = cut(block, child, rows, columns)
    if found is None:
        return Kind("spectral", what, own)
    layout = replace(own, split=found.split, groups=found.groups)
    if not found.known:
        return Kind(None, f"fused {found.what}, in an order that {class_name(block)} does not say", layout)
    fused = f"fused {found.what}"
    return Kind("spectral", fused if what == "hidden Linear" else f"{what}, {fused}", layout)


def _convolution(place: Place, module: nn.modules.conv._ConvNd) -> Kind:
    transpose = isinstance(module, nn.modules.conv._ConvTransposeNd)
    axis, groups = "fan_in" if transpose else "fan_out", module.groups
    layout = Layout("conv", heads=groups, axis=axis if groups > 1 else "fan_out", transpose=transpose)
    if groups == module.in_channels > 1:
        return Kind("adamw", "depthwise convolution", layout)
    if groups > 1:
        return Kind("spectral", f"hidden convolution, {groups} groups", layout)
    if place.child.startswith("pointwise_conv") and place.block is not None:
        rows, columns = place.parameter.shape[:2]
        return _projection("hidden convolution", place.block, place.child, rows, columns, layout)
    return Kind("spectral", "hidden convolution" + (", transposed" if transpose else ""), layout)


def _recurrent(place: Place) -> Kind | None:
    if not isinstance(place.module, (nn.RNNBase, nn.RNNCellBase)) or place.parameter.ndim != 2:
        return None
    gates = next((n for cell, n in GATES if isinstance(place.module, cell)), 1)
    if gates == 1 or place.attribute.startswith("weight_hr"):
        return Kind("spectral", "recurrent matrix", Layout("matrix"))
    return Kind("spectral", f"{gates} gates ({class_name(place.module)})", Layout("matrix", split=gates))


def _attention(place: Place) -> Kind | None:
    if not isinstance(place.module, nn.MultiheadAttention) or place.parameter.ndim != 2:
        return None
    if place.attribute == "in_proj_weight":
        return Kind("spectral", "fused q, k, v", Layout("matrix", split=3))
    return Kind("spectral", "hidden projection", Layout("matrix"))


def _bank(place: Place) -> Kind | None:
    found = bank(place)
    if found is None:
        return None
    if found.layout is None:
        what = f"{found.what}, but {class_name(place.module)}.{place.attribute} may be (experts, out, in) or (experts, in, out)"
        return Kind(None, what, Layout("experts"))
    return Kind("spectral", found.what, found.layout)


# Of parameters that a module holds itself, the name is all there is; what looks like a projection is left to the user.
_PROJECTION = re.compile(r"proj|kernel|matrix|linear|weight")

_NAMES = (
    ("bias", re.compile(r"bias")),
    ("position table", re.compile(r"(^|_)(pos|position|positions|positional|rel|relative)(_|$)|pos_?(emb|enc)")),
    (
        "table of vectors",
        re.compile(
            r"(^|_)(emb|embed|embeds|embedding|embeddings|token|tokens|latent|latents|queries|prompt|prompts|codebook|codebooks|"
            r"codevectors|prototypes|registers)(_|$|\d)"
        ),
    ),
    ("gains", re.compile(r"(^|_)(scale|scales|gain|gains|gamma|beta|alpha|lambda|temperature|norm)(_|$|\d)")),
    ("state decay", re.compile(r"^(log_)?A(_log|_logs|_real|_imag|_re|_im)?$|^time_(decay|first|faaaa)$")),
)


def _named(place: Place) -> Kind | None:
    p, what = place.parameter, class_name(place.module)
    if sum(n > 1 for n in p.shape) <= 1:
        return Kind("adamw", f"vector ({what}.{place.attribute})")
    held = place.child if isinstance(place.module, (nn.ParameterList, nn.ParameterDict)) else place.attribute
    for reason, names in _NAMES:
        if names.search(held) and (reason == "bias" or not _PROJECTION.search(held)):
            return Kind("adamw", f"{reason} ({what}.{place.attribute})", _own_layout(place))
    return None
