"""A fair comparison of optimizers: the same number of trials for each, on a seed of their own, then several seeds at the best.

What is tuned is each contender's own space: the lr of matrices, and of the AdamW beside it lr and decay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from schatten.lab.fit import Fit, Loop, fit
from schatten.lab.ledger import Ledger, Row
from schatten.lab.tasks import Task
from schatten.lab.tuning import Params, Space, tune

# No seed of the comparison: what was tuned on a seed would look better on it.
TUNING_SEED = 1000


@dataclass(frozen=True)
class Contender:
    """An optimizer `build(model, params)` and the `space` of its params.

    `closure`: its step calls the closure; `gradients`: evaluations of the gradient in a step, by which its steps are divided
    so that all contenders see as many.
    """

    name: str
    build: Callable[[nn.Module, Params], torch.optim.Optimizer]
    space: Space
    closure: bool = False
    gradients: float = 1


def contest(
    ledger: Ledger,
    task: Task,
    contenders: Sequence[Contender],
    loop: Loop,
    *,
    trials: int,
    seeds: int,
    label: Mapping[str, Any] | None = None,
    sampler: str = "tpe",
    score: Callable[[Fit], float] = lambda found: found.loss,
    extra: Callable[[Fit], Mapping[str, Any]] = lambda found: {},
) -> dict[str, list[Row]]:
    """Tune every contender by `trials` trials, run seeds 0 .. seeds-1 at its best params, and return those rows by name.

    Rows have `label`, `phase` ("tune" or "final"), `optimizer`, the params and `seed`; found are `score` (lower is better),
    `loss`, `train` (the mean of the last tenth), `steps`, `seconds`, and what `extra` adds.
    """
    finals = {}
    for contender in contenders:
        own = replace(loop, steps=max(1, round(loop.steps / contender.gradients)))

        def measured(params: Params, phase: str, seed: int, contender: Contender = contender, own: Loop = own) -> Row:
            case = {**(label or {}), "phase": phase, "optimizer": contender.name, **params, "seed": seed}

            def compute() -> Mapping[str, Any]:
                found = fit(
                    task,
                    lambda model: contender.build(model, params),
                    own,
                    seed=seed,
                    closure=contender.closure,
                    folder=ledger.checkpoints(case),
                )
                scores = {"score": score(found), "loss": found.loss, "train": found.tail(), "steps": found.steps}
                return {**scores, "seconds": found.seconds, "optimizer_seconds": found.optimizer_seconds, **extra(found)}

            return ledger.measure(case, compute)

        def objective(params: Params, measured: Callable[..., Row] = measured) -> float:
            return measured(params, "tune", TUNING_SEED)["score"]

        best = tune(objective, contender.space, trials, sampler=sampler)
        finals[contender.name] = [measured(best.params, "final", seed) for seed in range(seeds)]
    return finals
