"""Listing: which quantities there are. A file of `schatten.diagnostics` with a QUANTITY is one; nothing else registers it."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType

from schatten import diagnostics
from schatten.diagnostics.core import Quantity

Known = Mapping[str, type[Quantity]]


@lru_cache(maxsize=1)
def known() -> Known:
    """Every quantity's class by its name, in the order of the names.

    Example:
        >>> from schatten.monitor import known
        >>> "gradient" in known()
        True
    """
    found = {}
    for module in pkgutil.iter_modules(diagnostics.__path__):
        quantity = getattr(importlib.import_module(f"{diagnostics.__name__}.{module.name}"), "QUANTITY", None)
        if quantity is not None:
            found[quantity.name] = quantity
    return MappingProxyType(dict(sorted(found.items())))


def chosen(quantities: Iterable[str | Quantity]) -> tuple[Quantity, ...]:
    """Quantities from names, with their default options, or from instances, in the same order.

    Raises ValueError for an unknown name, for one given twice and for none at all, TypeError for what is no quantity.

    Example:
        >>> from schatten.monitor import chosen
        >>> [quantity.name for quantity in chosen(["gradient", "update"])]
        ['gradient', 'update']
    """
    if isinstance(quantities, str):
        raise TypeError(f"quantities must be a list of names or quantities, got a text: write [{quantities!r}].")
    found: dict[str, Quantity] = {}
    for one in quantities:
        if isinstance(one, str) and one not in known():
            near = get_close_matches(one, known(), n=1)
            raise ValueError(
                f"No quantity is named {one!r}{f', did you mean {near[0]!r}?' if near else '.'} Known are {', '.join(known())}."
            )
        quantity = known()[one]() if isinstance(one, str) else one
        if isinstance(quantity, type) or not isinstance(quantity, Quantity):
            raise TypeError(
                f"A quantity is a name or an object with name, scope, needs, columns and cost that can be called, got "
                f"{quantity!r}; known names are {', '.join(known())}."
            )
        if quantity.name in found:
            raise ValueError(f"A quantity is measured once, got {quantity.name!r} twice.")
        found[quantity.name] = quantity
    if not found:
        raise ValueError(f"quantities must name at least one of {', '.join(known())}.")
    return tuple(found.values())


def page() -> str:
    """Tables of all quantities and of their columns, Markdown, for docs/instruments.md (scripts/instruments_table.py).

    Example:
        >>> from schatten.monitor import page
        >>> page().splitlines()[0]
        '| quantity | of each | reads weights and | cost |'
    """
    lines = ["| quantity | of each | reads weights and | cost |", "|---|---|---|---|"]
    columns = ["| column | what it is |", "|---|---|"]
    for name, quantity in known().items():
        needs = ", ".join(sorted(quantity.needs)) or "nothing else"
        lines.append(f"| `{name}` | {quantity.scope} | {needs} | {_cell(quantity.cost)} |")
        columns += [f"| `{name}/{column}` | {_cell(meaning)} |" for column, meaning in quantity.columns.items()]
    return "\n".join([*lines, "", *columns]) + "\n"


def _cell(text: str) -> str:
    """Text whose norms and inner products are no cell's end and no tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
