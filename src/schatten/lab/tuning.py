"""Tuning on equal terms: the same number of trials for every contender, drawn by Optuna from ranges that are written down."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Params = dict[str, Any]

# TPE learns from the trials before it, of which it wants as many. Its own are random, and few random numbers leave gaps: six
# draws of a lone lr with seed 0 fall in a third of its range.
START = 10


@dataclass(frozen=True)
class Span:
    """All numbers from `low` to `high`, on a logarithmic scale unless `log=False`."""

    low: float
    high: float
    log: bool = True


Space = Mapping[str, Span | Sequence[Any]]


@dataclass(frozen=True)
class Tuned:
    """The best trial: `params` and its `loss`; `trials` are all, in the order they were tried, divergence as inf."""

    params: Params
    loss: float
    trials: tuple[tuple[Params, float], ...]


def tune(objective: Callable[[Params], float], space: Space, trials: int, *, seed: int = 0, sampler: str = "tpe") -> Tuned:
    """The params of `space` with the lowest `objective(params)` of `trials` tried.

    `sampler` is `"grid"` (every entry of `space` a list, `trials` their product), `"random"`, or `"tpe"`: the first ten
    are a Latin hypercube, one value in each tenth of every range, the rest are TPE's. A function of `seed` and the
    objective's values: an interrupted run whose objective remembers its values repeats the same trials.

    Raises ValueError for a grid with another number of points than `trials`.

    Example:
        >>> from schatten.lab.tuning import tune
        >>> tune(lambda p: (p["lr"] - 2) ** 2, {"lr": [1, 2, 3]}, 3, sampler="grid").params
        {'lr': 2}
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    grid = {name: list(entry) for name, entry in space.items() if not isinstance(entry, Span)}
    if sampler == "grid":
        points = math.prod(map(len, grid.values()))
        if len(grid) < len(space) or points != trials:
            raise ValueError(f"sampler='grid' tries every point of lists: space has {points}, trials is {trials}.")
        samplers = optuna.samplers.GridSampler(grid, seed=seed)
    elif sampler == "random":
        samplers = optuna.samplers.RandomSampler(seed=seed)
    else:
        samplers = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(sampler=samplers)
    if sampler == "tpe":
        for point in _hypercube(space, min(trials, START), seed):
            study.enqueue_trial(point)
    done: list[tuple[Params, float]] = []

    def one(trial: "optuna.Trial") -> float:
        params = {
            name: trial.suggest_float(name, entry.low, entry.high, log=entry.log)
            if isinstance(entry, Span)
            else trial.suggest_categorical(name, list(entry))
            for name, entry in space.items()
        }
        value = objective(params)
        done.append((params, value if math.isfinite(value) else math.inf))
        # Optuna refuses nan, and its sampler takes inf for a very bad value.
        return done[-1][1]

    study.optimize(one, n_trials=trials)
    params, loss = min(done, key=lambda pair: pair[1])
    return Tuned(params, loss, tuple(done))


def _hypercube(space: Space, count: int, seed: int) -> list[Params]:
    """`count` points of which each range, cut in `count` equal parts, has one in every part."""
    from scipy.stats import qmc

    rows = qmc.LatinHypercube(len(space), rng=seed).random(count) if space else []
    return [{name: _at(entry, float(u)) for (name, entry), u in zip(space.items(), row, strict=True)} for row in rows]


def _at(entry: Span | Sequence[Any], u: float) -> Any:
    """The value at share `u` of a range."""
    if not isinstance(entry, Span):
        return list(entry)[int(u * len(entry))]
    if entry.log:
        return math.exp(math.log(entry.low) + u * (math.log(entry.high) - math.log(entry.low)))
    return entry.low + u * (entry.high - entry.low)
