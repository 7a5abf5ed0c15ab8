"""The results of a study, one for each settled trial, as tables and pictures take them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schatten.lab.sweep_study import WHY, Slot
from schatten.lab.tuning import Params


@dataclass(frozen=True)
class Result:
    """A settled trial. `loss` is inf where training diverged or the trial failed, of a pruned one its last evaluation.

    `state` is "complete", "diverged", "pruned" or "failed", `deaths` how often a worker died at it, `note` why it failed.
    """

    slot: int
    params: Params
    loss: float
    state: str
    seconds: float = math.nan
    deaths: int = 0
    note: str = ""


def results(slots: Sequence[Slot]) -> list[Result]:
    """The settled trials, the best first; pruned ones after all complete ones, then diverged and failed ones."""
    found = [_result(slot) for slot in slots if slot.result is not None]
    ranks = ("complete", "pruned", "diverged", "failed")
    return sorted(found, key=lambda r: (ranks.index(r.state), r.loss, r.slot))


def _result(slot: Slot) -> Result:
    trial = slot.result
    assert trial is not None
    deaths, duration = len(slot.deaths), trial.duration
    seconds = math.nan if duration is None else duration.total_seconds()
    if trial.state.name == "FAIL":
        note = trial.user_attrs.get(WHY, f"its worker died at each of {deaths} attempts")
        return Result(slot.number, trial.params, math.inf, "failed", seconds, deaths, note)
    loss = math.inf if trial.value is None else float(trial.value)
    state = "pruned" if trial.state.name == "PRUNED" else "complete" if math.isfinite(loss) else "diverged"
    return Result(slot.number, trial.params, loss, state, seconds, deaths)


def summary(found: Sequence[Result], count: int) -> str:
    """One line: how many trials ended how."""
    states = [r.state for r in found]
    parts = [f"{states.count(state)} {state}" for state in ("complete", "pruned", "diverged", "failed") if state in states]
    tried = sum(r.deaths for r in found)
    again = f"; {tried} tried again after a worker died" if tried else ""
    return f"{len(found)} of {count} trials: {', '.join(parts) or 'none'}{again}"


def edges(best: Result, space: Mapping[str, Any]) -> list[str]:
    """The names whose best value is an end of what was tried, within a tenth of a span: the best may lie beyond."""
    found = []
    for name, entry in space.items():
        value = best.params[name]
        if isinstance(entry, Mapping):
            low, high, at = (math.log(v) if entry["log"] else v for v in (entry["low"], entry["high"], value))
            share = (at - low) / (high - low)
            found += [name] if min(share, 1 - share) < 0.1 else []
        elif len(entry) > 2 and value in (min(entry), max(entry)):
            found.append(name)
    return found
