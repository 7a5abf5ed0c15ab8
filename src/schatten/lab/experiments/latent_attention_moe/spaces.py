"""The ranges from which both optimizers are tuned, and whether a best value lies at an end of one."""

import math
from collections.abc import Sequence

from schatten.lab.ledger import Row
from schatten.lab.tuning import Span

DECAY = Span(1e-3, 0.3)

SPACES = {
    "adamw": {"lr": Span(1e-3, 3e-2), "weight_decay": DECAY},
    "muon": {"lr": Span(3e-3, 1e-1), "aux_lr": Span(2e-3, 1e-1), "weight_decay": DECAY},
}

# The outer share of a range, on its logarithmic scale, that counts as its end.
END = 0.1


def at_ends(finals: Sequence[Row]) -> list[str]:
    """Learning rates of the best settings that lie at an end of their range, as text."""
    found = []
    for row in finals:
        for name in ("lr", "aux_lr"):
            span = SPACES[row["optimizer"]].get(name)
            if span is not None and name in row:
                place = math.log(row[name] / span.low) / math.log(span.high / span.low)
                if not END <= place <= 1 - END:
                    found.append(f"{name} {row[name]:.2g} of {row['optimizer']} on {row['model']}")
    return sorted(set(found))
