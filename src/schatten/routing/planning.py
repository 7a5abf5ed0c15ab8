"""`plan`: the route of every parameter of a model, and everything about it that must not pass in silence."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from schatten.groups import ALGORITHMS
from schatten.layout import Layout, resolve
from schatten.routing.entries import Entry, Plan, size
from schatten.routing.heads import heads
from schatten.routing.kinds import Kind, is_table, kind
from schatten.routing.places import Place, by_parameter, overlaps, places, span
from schatten.routing.rules import Override, hits, read
from schatten.routing.sharding import refuse_flat
from schatten.routing.sizes import linear_sizes


def plan(model: nn.Module, rules: Sequence[tuple[Any, ...]] = (), *, others: str = "adamw", strict: bool = True) -> Plan:
    """Decide for every trainable parameter of `model` between the spectral rule and AdamW, by the module that owns it.

    Args:
        model: a module; torch.compile, DDP and checkpointing wrappers are seen through, so names are the plain model's.
        rules: overrides `(pattern, route)`, then a layout (a kind's name or a `Layout`), an lr and a dict of group options,
            each if wanted, such as `("*.experts.w13", "spectral", Layout("experts", split=2), 1e-3, {"weight_decay": 0})`.
            A pattern is a glob of the parameter's name, a compiled regular expression to be found in it, or a function
            `(name, module, parameter) -> bool`; any name of a shared parameter counts. The first rule that matches and
            names a route decides it. The route `"auto"` leaves it to the modules and only sets the layout or options;
            these hold whatever another rule says of the route, and the first rule to give an option gives it.
        others: where what is no hidden matrix goes: `"adamw"`, or `"spectral"`, to the same rule as the hidden matrices but
            read as one vector (layout `"flat"`), for rules that act on entries or on whole tensors.
        strict: raise for a parameter of two or more dimensions whose kind is not known; False sends it to AdamW.

    Raises ValueError for a rule that matches no parameter or names no route, for parameters of unknown kind (with a rule to
    paste for each), for parameters that share memory but not the route, for flat shards of FSDP1 and ZeRO, for a model with
    no spectral matrix, and for lazy modules that have no shapes yet.

    Example:
        >>> import torch, schatten
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 10))
        >>> for entry in schatten.plan(model): print(entry.name, entry.route, entry.reason)
        0.weight adamw embedding
        1.weight spectral hidden Linear
        1.bias adamw bias
        2.weight adamw output head: Linear onto the vocabulary of 0.weight
        2.bias adamw bias
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan reads a torch.nn.Module, got {type(model).__name__}.")
    if others not in ALGORITHMS:
        raise ValueError(f"others must be one of {', '.join(map(repr, ALGORITHMS))}, got {others!r}.")
    overrides = [read(rule) for rule in rules]
    found = places(model)
    owners = by_parameter(found)
    known = _known(model, found, owners)
    matched: set[int] = set()
    entries, unknown, frozen = [], [], 0
    for own in owners.values():
        first = own[0]
        p = first.parameter
        meant = hits(overrides, own)
        matched.update(meant)
        if not p.requires_grad:
            frozen += 1
            continue
        _refuse_unusable(first)
        what = known.get(id(p)) or kind(first)
        said = [overrides[k] for k in meant]
        route = next((rule for rule in said if rule.route != "auto"), None)
        if route is None and what.route is None and others == "adamw":
            unknown.append((first, what))
        entries.append(_entry(first, what, route, said, others))
    for k, override in enumerate(overrides):
        if k not in matched:
            names = ", ".join(own[0].name for own in list(owners.values())[:5])
            raise ValueError(f"Rule {override.text} matches no parameter of the model, whose names are like: {names}.")
    if unknown and strict:
        raise ValueError(_ambiguity(unknown))
    _refuse_two_routes(entries, owners)
    if not any(e.route == "spectral" for e in entries):
        raise ValueError(
            "No parameter of this model is routed to a spectral rule, so it would train by AdamW alone. "
            'Add a rule such as ("blocks.*.weight", "spectral"), or use torch.optim.AdamW.\n'
            + str(Plan(tuple(entries), frozen))
        )
    return Plan(tuple(entries), frozen)


def _known(model: nn.Module, found: Sequence[Place], owners: Mapping[int, list[Place]]) -> dict[int, Kind]:
    """id -> kind of tables, of what shares their memory, and of output heads."""
    told = _input_tables(model)
    tables = {key: own for key, own in owners.items() if any(_looks_up(place, told) for place in own)}
    known = {key: Kind("adamw", reason) for key, reason in heads(model, found).items()}
    spans: dict[int, list[tuple[int, int, Place]]] = {}
    for key, own in tables.items():
        others = [place.name for place in own if not _looks_up(place, told)]
        known[key] = Kind("adamw", "embedding" + (f", tied with {', '.join(others)}" if others else ""), Layout("matrix"))
        storage, first, end = span(own[0].parameter)
        spans.setdefault(storage, []).append((first, end, own[0]))
    for key, own in owners.items():
        storage, first, end = span(own[0].parameter)
        for start, stop, table in spans.get(storage, []):
            if key not in tables and first < stop and start < end:
                known[key] = Kind("adamw", f"shares storage with the embedding {table.name}", Layout("matrix"))
    return known


def _looks_up(place: Place, told: Collection[nn.Module]) -> bool:
    return place.parameter.ndim > 1 and (is_table(place.module) or place.module in told)


def _input_tables(model: nn.Module) -> set[nn.Module]:
    """What a Hugging Face model calls its input embeddings, where that is a table and no projection of patches."""
    told: set[nn.Module] = set()
    for module in model.modules():
        if callable(getattr(type(module), "get_input_embeddings", None)):
            try:
                table = module.get_input_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError, TypeError):
                continue
            weight = getattr(table, "weight", None)
            if isinstance(table, nn.Module) and linear_sizes(table) is None and isinstance(weight, Tensor) and weight.ndim == 2:
                told.add(table)
    return told


def _refuse_unusable(place: Place) -> None:
    p, name = place.parameter, place.name
    if isinstance(p, UninitializedParameter):
        raise ValueError(f"{name!r} has no shape yet: run one batch through the lazy module, then build the optimizer.")
    refuse_flat(repr(name), p, place.module, place.attribute)


def _entry(place: Place, what: Kind, deciding: Override | None, said: Sequence[Override], others: str) -> Entry:
    """The entry of a parameter that `said` mean, of which `deciding` names the route, or `what` it is."""
    name, shape = place.name, tuple(place.parameter.shape)
    heard = [rule for rule in said if rule.route == "auto" or rule is deciding]
    options: dict[str, Any] = {}
    for rule in heard:
        options = {**rule.options, **options}
    layout = next((rule.layout for rule in heard if rule.layout is not None), what.layout or Layout())
    route, reason = (deciding.route, f"rule {deciding.text}") if deciding is not None else (what.route, what.reason)
    if route is None:
        route, reason = "adamw", f"{reason}: add a rule if it is a matrix"
    if route == "adamw" and deciding is None and others == "spectral":
        route, layout = "spectral", Layout("flat")
    own = resolve(layout, shape, repr(name)) if route == "spectral" else "-"
    return Entry(name, shape, route, own, reason, tuple(sorted(options.items())))


def _ambiguity(unknown: Sequence[tuple[Place, Kind]]) -> str:
    """What to say of parameters of no known kind: a rule for each to paste."""
    lines = []
    for place, what in unknown:
        shape = tuple(place.parameter.shape)
        kind_of = what.layout or Layout({2: "matrix", 3: "experts"}.get(len(shape), "conv"))
        layout = f'"{kind_of.kind}"' if kind_of == Layout(kind_of.kind) else f"schatten.{kind_of!r}"
        more = "" if kind_of == Layout("matrix") else f", {layout}"
        lines.append(f'    ("{place.name}", "spectral"{more}),  # {size(shape)}: {what.reason}')
    return (
        f"{len(unknown)} parameter{'s' * (len(unknown) > 1)} of this model may be matrices or tables, and nothing here can "
        f'tell. Say so in rules, changing "spectral" to "adamw" for tables, gains and routers and the layout where it is '
        f"another, or pass strict=False to train them by AdamW:\n" + "\n".join(lines)
    )


def _refuse_two_routes(entries: Sequence[Entry], owners: Mapping[int, list[Place]]) -> None:
    routes = {entry.name: entry for entry in entries}
    trained = {own[0].name: own[0].parameter for own in owners.values() if own[0].name in routes}
    for one, other in overlaps(trained):
        a, b = routes[one], routes[other]
        if a.route != b.route:
            raise ValueError(
                f"Parameters that share memory need one route, but {one!r} of shape {a.shape} goes to {a.route} ({a.reason}) "
                f"and {other!r} of shape {b.shape} to {b.route} ({b.reason}): add a rule that gives both the same, or tie "
                f"them by assigning one nn.Parameter to both modules."
            )
