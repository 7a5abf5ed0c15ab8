"""Overrides of a plan: which parameters a rule means, and what it says of them."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from torch import Tensor

from schatten.groups import ALGORITHMS
from schatten.layout import Layout
from schatten.routing.places import Place

FORM = "(pattern, route) and then, each if wanted, a layout, an lr and a dict of group options"

ROUTES = (*ALGORITHMS, "auto")


@dataclass(frozen=True)
class Override:
    """A rule, read: `means(place)` tells its parameters, `layout` is None where it does not say one."""

    text: str
    means: Callable[[Place], bool]
    route: str
    layout: str | Layout | None
    options: Mapping[str, Any]


def read(rule: Any) -> Override:
    """A rule as `schatten.plan` takes it; ValueError for one of another form."""
    if not isinstance(rule, (tuple, list)) or len(rule) < 2:
        raise ValueError(f"A rule is {FORM}, got {rule!r}.")
    pattern, route, *rest = rule
    text, means = _pattern(pattern, rule)
    if route not in ROUTES:
        raise ValueError(f"A rule's route must be one of {', '.join(map(repr, ROUTES))}, got {route!r} for {text}.")
    said: dict[str, Any] = {}
    for i, item in enumerate(rest):
        if isinstance(item, Mapping) and i == len(rest) - 1:
            given = dict(item)
        elif isinstance(item, (str, Layout)):
            given = {"layout": item}
        elif isinstance(item, (int, float, Tensor)) and not isinstance(item, bool):
            given = {"lr": item}
        else:
            raise ValueError(f"A rule is {FORM}, got {rule!r}.")
        if twice := sorted(set(given) & set(said)):
            raise ValueError(f"A rule says a thing once, but {twice[0]!r} is in {rule!r} twice.")
        said.update(given)
    layout = said.pop("layout", None)
    return Override(text, means, route, layout if layout is None or isinstance(layout, Layout) else Layout(layout), said)


def _pattern(pattern: Any, rule: Any) -> tuple[str, Callable[[Place], bool]]:
    if isinstance(pattern, str):
        glob = re.compile(translate(pattern))
        return repr(pattern), lambda place: any(map(glob.match, place.names))
    if isinstance(pattern, re.Pattern):
        return repr(pattern.pattern), lambda place: any(map(pattern.search, place.names))
    if callable(pattern) and not isinstance(pattern, type):
        text = getattr(pattern, "__name__", repr(pattern))
        return text, lambda place: bool(pattern(place.name, place.module, place.parameter))
    raise ValueError(
        f"A rule's pattern is a glob, a compiled regular expression or a function (name, module, parameter) -> bool, got "
        f"{pattern!r} in {rule!r}."
    )


def hits(overrides: Sequence[Override], own: Iterable[Place]) -> list[int]:
    """Indices of the overrides that mean the parameter registered at these places, under any of its names."""
    own = list(own)
    return [k for k, override in enumerate(overrides) if any(map(override.means, own))]
