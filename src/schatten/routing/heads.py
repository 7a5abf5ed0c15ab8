"""Output heads: the weights whose rows are a model's classes or tokens, found where the model names them.

A row of a head is the vector of one class, as a row of a table is that of one token: AdamW's, as Keller Jordan's Muon has it.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile

from torch import nn
from torch.nn.parameter import UninitializedParameter

from schatten.routing.kinds import is_table
from schatten.routing.places import Place, span
from schatten.routing.sizes import linear_sizes, number

# Children of the whole model that are its heads wherever they stand, and those that are if they hold the last matrix.
HEADS = (
    "head",
    "heads",
    "lm_head",
    "lm_heads",
    "classifier",
    "score",
    "qa_outputs",
    "embed_out",
    "unembed",
    "to_logits",
    "logits",
)

LAST = ("fc", "fc_out", "linear", "last_linear", "out", "output", "output_layer")

# Tables that no head maps onto, by the parts of their names.
NO_TOKENS = re.compile(r"(^|[._])(wpe|pos|position\w*|token_type\w*|segment\w*)([._]|$)|pos_?emb")


def heads(model: nn.Module, found: Sequence[Place]) -> dict[int, str]:
    """id of a head's weight -> the reason.

    In turn: what a model's own `get_output_embeddings` (Hugging Face) or `get_classifier` (timm) returns; children of the
    model with the name of a head; the last matrix, if its rows are as many as `num_labels` or `num_classes`; the last
    Linear with the shape of an embedding, token tables before position tables. A Linear tied to an embedding is the head
    of its model, so then no shape is compared.
    """
    matrices = [place for place in found if _is_matrix(place)]
    named = {**_by_name(matrices, found), **_told(model)}
    return named or _by_labels(model, matrices) or _by_vocabulary(matrices, found)


def _is_matrix(place: Place) -> bool:
    return place.attribute == "weight" and place.parameter.ndim >= 2 and _maps(place.module)


def _maps(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or linear_sizes(module) is not None


def _told(model: nn.Module) -> dict[int, str]:
    told: dict[int, str] = {}
    for module in model.modules():
        for method in ("get_output_embeddings", "get_classifier"):
            if callable(getattr(type(module), method, None)):
                try:
                    head = getattr(module, method)()
                except (AttributeError, NotImplementedError, TypeError):
                    continue  # a trunk that has inherited the method from its models with a head
                for p in head.parameters() if isinstance(head, nn.Module) else ():
                    if p.ndim >= 2:
                        told[id(p)] = f"output head of {type(module).__name__}"
    return told


def _fan_in(place: Place) -> int:
    sizes = linear_sizes(place.module)
    return sizes[1] if sizes is not None else place.module.in_channels  # type: ignore[return-value]


def _by_name(matrices: Sequence[Place], found: Sequence[Place]) -> dict[int, str]:
    root = _root(found)
    named: dict[int, str] = {}
    for i, place in enumerate(matrices):
        child = place.path[root] if len(place.path) > root else ""
        last = i + 1 == len(matrices)
        inside = next((other for other in matrices[i + 1 :] if other.path[: root + 1] == place.path[: root + 1]), None)
        listed = len(place.path) > root + 1 and isinstance(place.above[root + 1], (nn.ModuleList, nn.ModuleDict))
        if listed:
            # One head for each entry that is a head by itself; entries of a class of their own may be heads of attention.
            entry = place.above[root + 2] if len(place.path) > root + 2 else place.module
            ends = inside is None or inside.path[: root + 2] != place.path[: root + 2]
            is_head = child in HEADS and ends and (isinstance(entry, nn.Sequential) or _maps(entry))
        else:
            is_head = inside is None and (
                child in HEADS or child.endswith(("_head", "_heads", "_classifier")) or (last and child in LAST)
            )
        # A layer whose rows a later one reads is hidden, as the first of ModernBERT's prediction head.
        if is_head and not any(_fan_in(other) == place.parameter.shape[0] for other in matrices[i + 1 :]):
            named[id(place.parameter)] = f"output head, named {'.'.join(place.path)}"
    return named


def _root(found: Sequence[Place]) -> int:
    """How many modules from the model down hold all its parameters: a LightningModule's or an adapter's own model is one."""
    paths = [place.path[:-1] for place in found]
    columns = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return sum(1 for _ in columns)


def _by_labels(model: nn.Module, matrices: Sequence[Place]) -> dict[int, str]:
    for module in _chain(model):
        labels = number(module, "num_labels", "num_classes")
        if labels and matrices and matrices[-1].parameter.shape[0] == labels:
            return {id(matrices[-1].parameter): f"output head: onto the {labels} classes of {type(module).__name__}"}
    return {}


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model and its only children."""
    yield model
    while len(children := [m for m in model.children() if any(True for _ in m.parameters())]) == 1:
        model = children[0]
        yield model


def _by_vocabulary(matrices: Sequence[Place], found: Sequence[Place]) -> dict[int, str]:
    linears = [place for place in matrices if isinstance(place.module, nn.Linear)]
    embeddings = [o for o in found if is_table(o.module) and not isinstance(o.parameter, UninitializedParameter)]
    embeddings = [o for o in embeddings if o.parameter.ndim == 2 and NO_TOKENS.search(o.name) is None]
    tied = {span(o.parameter) for o in embeddings}
    if any(span(o.parameter) in tied for o in linears):
        return {}
    # A square table beside others is a position table, whose shape is also that of hidden matrices.
    for table in [o for o in embeddings if o.parameter.shape[0] != o.parameter.shape[1]] or embeddings:
        for linear in reversed(linears):
            if linear.parameter.shape == table.parameter.shape:
                return {id(linear.parameter): f"output head: Linear onto the vocabulary of {table.name}"}
    return {}
