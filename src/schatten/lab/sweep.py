"""What a sweep measures: a task of the laboratory, trained with one optimizer at a point of the space, scored by its loss.

A `Sweep` is all that the score depends on. The study that keeps it (`lab.sweep_study`) refuses one that differs.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from schatten.lab import data, images, optimizers, sweep_space
from schatten.lab.config import PRECISIONS
from schatten.lab.errors import InputError
from schatten.lab.fit import Loop, fit
from schatten.lab.models import GPT, MLP, GPTConfig
from schatten.lab.schedule import SCHEDULES
from schatten.lab.sweep_space import Entry
from schatten.lab.tasks import Classification, NextToken, Task
from schatten.lab.tuning import Params

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("halving", "none")

HEAD_WIDTH = 32

# Called with (step, loss) of every evaluation; raises to end the trial.
Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Sweep:
    """A study's settings, checked at construction. `trials=None`: of a grid its points, else 60."""

    task: str = "digits"
    data: str = ""
    tokens: str = "byte"
    optimizer: str = "muon"
    space: Mapping[str, Entry] = field(default_factory=dict)
    trials: int | None = None
    sampler: str = "tpe"
    pruner: str = "none"
    steps: int = 200
    seeds: int = 1
    batch: int = 32
    layers: int = 2
    width: int = 64
    context: int = 64
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 0.0
    mixed_precision: str = "no"
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in {
            "task": tuple(DEFAULT_DATA),
            "sampler": SAMPLERS,
            "pruner": PRUNERS,
            "schedule": SCHEDULES,
            "mixed_precision": PRECISIONS,
        }.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{_flag(name)} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        object.__setattr__(self, "data", self.data or DEFAULT_DATA[self.task])
        object.__setattr__(self, "eval_every", self.eval_every or max(1, self.steps // 10))
        for name in ("steps", "seeds", "batch", "layers", "width", "context", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{_flag(name)} must be at least 1, got {getattr(self, name)}.")
        for name in ("clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{_flag(name)} must be finite and at least 0, got {getattr(self, name):g}.")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"--warmup must be at least 0 and below --steps {self.steps}, got {self.warmup}.")
        if self.task == "gpt" and self.width % HEAD_WIDTH:
            raise InputError(f"--width must be a multiple of {HEAD_WIDTH}, the width of a head, got {self.width}.")
        if not self.space:
            sweep_space.parse(())
        sweep_space.check(self.optimizer, self.space)
        points = len(sweep_space.grid(self.space, self.seed)) if self.sampler == "grid" else 60
        object.__setattr__(self, "trials", points if self.trials is None else self.trials)
        if self.sampler == "grid" and self.trials != points:
            raise InputError(f"--sampler grid tries all {points} points of the space: leave out --trials {self.trials}.")
        if self.trials is not None and self.trials < 1:
            raise InputError(f"--trials must be at least 1, got {self.trials}.")

    def plain(self, fingerprint: str) -> dict[str, Any]:
        """What a study must agree on, as JSON values: data by `fingerprint`, as its place differs between machines."""
        settings = {**asdict(self), "space": sweep_space.plain(self.space), "data": fingerprint}
        return {name: value for name, value in settings.items() if name != "trials"}


@dataclass(frozen=True)
class Objective:
    """The score of a point: the mean final validation loss over seeds 0 .. seeds-1, inf where a run diverged."""

    sweep: Sweep
    task: Task
    fingerprint: str

    @staticmethod
    def load(sweep: Sweep) -> "Objective":
        """Read the data. Raises InputError for what is missing or damaged."""
        sizes = sweep
        if sweep.task == "digits":
            found = images.load(sweep.data)
            widths = (math.prod(found.shape), *(sizes.width,) * sizes.layers, found.classes)
            return Objective(sweep, Classification(found, lambda: MLP(widths, bias=True)), found.fingerprint)
        corpus = data.load(sweep.data, sweep.tokens, sweep.context)
        config = GPTConfig(corpus.vocabulary, sizes.context, sizes.layers, sizes.width // HEAD_WIDTH, sizes.width)
        return Objective(sweep, NextToken(corpus, sizes.context, lambda: GPT(config)), corpus.fingerprint)

    def __call__(self, params: Params, report: Report) -> float:
        """Train at `params`. `report` sees the evaluations of the first seed, at which a trial can be ended early."""
        sweep = self.sweep
        loop = Loop(
            steps=sweep.steps,
            batch=sweep.batch,
            warmup=sweep.warmup,
            schedule=sweep.schedule,
            clip=sweep.clip,
            mixed_precision=sweep.mixed_precision,
            eval_every=sweep.eval_every,
        )
        losses = []
        for seed in range(sweep.seeds):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=sweep_space.EDGE)
                found = fit(
                    self.task,
                    lambda model: sweep_space.build(sweep.optimizer, model, params),
                    loop,
                    seed=seed,
                    closure=optimizers.evaluates(sweep.optimizer),
                    report=report if seed == 0 else None,  # type: ignore[arg-type]
                )
            losses.append(math.inf if found.diverged else found.loss)
            if found.diverged:
                break
        return sum(losses) / len(losses)


DEFAULT_DATA = {"digits": images.EMBEDDED, "gpt": data.EMBEDDED}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
