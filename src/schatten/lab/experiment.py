"""What an experiment is: a published claim, settings for a laptop and for the published size, a run and a comparison.

    schatten.lab.experiments.NAME:  EXPERIMENT = Experiment(source, Config(), Config(...), run, check, pictures)

`run(config, ledger)` measures one case after another through the ledger, which keeps a row of each and knows those of a run
that was interrupted; `check(rows)` is a pure function of the rows, so a report can be written anew without measuring.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from schatten.lab.ledger import Ledger, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH = "reproduced", "not reproduced", "out of reach here"


@dataclass(frozen=True)
class Verdict:
    """One line of the reproduction table: a published number or ordering, what was found, and what follows.

    `why` says what the verdict rests on: the tolerance, n and p of a comparison, the scale, or what is missing.
    """

    quantity: str
    published: str
    ours: str
    verdict: Literal["reproduced", "not reproduced", "out of reach here"]
    why: str


def no_pictures(rows: Sequence[Row]) -> "Mapping[str, Figure]":
    return {}


@dataclass(frozen=True)
class Experiment:
    """One question of the literature.

    `source` is where it was asked; `quick` and `full` are two values of one frozen dataclass with a field `seeds`, whose
    other fields (`option(default, help)`) become flags; `lacks` says what the experiment still has to leave out.
    `pictures(rows)` maps a name to a figure, whose caption is its entry in `captions`.
    """

    source: str
    quick: Any
    full: Any
    run: Callable[[Any, Ledger], None]
    check: Callable[[Sequence[Row]], list[Verdict]]
    pictures: "Callable[[Sequence[Row]], Mapping[str, Figure]]" = no_pictures
    captions: Mapping[str, str] = field(default_factory=dict)
    lacks: str = ""


def option(default: Any, help: str) -> Any:
    """A field of a Config with the help of its flag. Types that make flags: int, float, str, bool, tuple of one of them."""
    return field(default=default, metadata={"help": help})


def verdict(quantity: str, published: str, ours: str, holds: bool, why: str) -> Verdict:
    """`holds` as a word."""
    return Verdict(quantity, published, ours, REPRODUCED if holds else NOT_REPRODUCED, why)
