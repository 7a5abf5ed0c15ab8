"""What a comparison is: one frozen dataclass, checked at construction, saved as config.json."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from accelerate.tracking import get_available_trackers

from schatten.lab import instruments, optimizers
from schatten.lab.errors import InputError
from schatten.lab.schedule import SCHEDULES, lr_factor

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    optimizer: str
    lr: float
    seed: int

    @property
    def id(self) -> str:
        return f"{self.optimizer}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class CompareConfig:
    """A comparison of optimizers from equal weights on equal batches. Defaults are those of `make demo`."""

    data: str = "pydoc"
    tokens: str = "byte"
    optimizers: tuple[str, ...] = ("adamw", "muon")
    lrs: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: int = 1
    steps: int = 300
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    qk_norm: bool = False
    dropout: float = 0.0
    batch: int = 12
    accumulate: int = 1
    weight_decay: float | None = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: int | None = None
    schedule: str = "cosine"
    final_lr: float = 0.1
    clip: float = 1.0
    mixed_precision: str = "no"
    fsdp: bool = False
    eval_every: int = 50
    eval_windows: int = 64
    final_eval_windows: int = 2048
    save_every: int = 200
    trackers: tuple[str, ...] = ("tensorboard",)
    instruments: tuple[str, ...] = ()
    instruments_every: int | None = None

    def __post_init__(self) -> None:
        if self.warmup is None:
            object.__setattr__(self, "warmup", self.steps // 20)
        assert self.warmup is not None
        if self.instruments_every is None:
            object.__setattr__(self, "instruments_every", self.eval_every)
        for name in self.optimizers:
            optimizers.check(name)
        if len(set(self.optimizers)) != len(self.optimizers) or not self.optimizers:
            raise InputError(f"--optimizers must name each optimizer once, got {','.join(self.optimizers) or 'none'}.")
        for name in self.optimizers:
            if not self.lrs.get(name):
                raise InputError(f"--lrs has no learning rate for {name}.")
            for lr in self.lrs[name]:
                if not 0 < lr < math.inf:
                    raise InputError(f"--lrs must be positive and finite, got {lr:g} for {name}.")
        if unused := set(self.lrs) - set(self.optimizers):
            raise InputError(f"--lrs names {', '.join(sorted(unused))}, which --optimizers does not.")
        sizes = ("seeds", "steps", "layers", "heads", "width", "context", "batch", "accumulate")
        for name in (*sizes, "eval_every", "eval_windows", "final_eval_windows", "save_every", "instruments_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        instruments.check(self.instruments, self.fsdp)
        if self.width % self.heads:
            raise InputError(f"--width must be a multiple of --heads, got {self.width} and {self.heads}.")
        available = [str(tracker) for tracker in get_available_trackers()]
        if unknown := [name for name in self.trackers if name not in available]:
            raise InputError(f"--trackers has no {', '.join(unknown)}: installed are {', '.join(available) or 'none'}.")
        if not 0 <= self.warmup < self.steps:
            raise InputError(f"--warmup must be at least 0 and below --steps {self.steps}, got {self.warmup}.")
        for name in ("weight_decay", "clip"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name):g}.")
        evaluating = [name for name in self.optimizers if optimizers.evaluates(name)]
        if evaluating and (self.accumulate > 1 or self.mixed_precision == "fp16"):
            raise InputError(
                f"--optimizers {', '.join(evaluating)} evaluate the loss themselves, which goes with --accumulate 1 and "
                f"without --mixed-precision fp16."
            )
        if self.fsdp and (whole := [name for name in self.optimizers if optimizers.moves_whole_weights(name)]):
            raise InputError(
                f"--optimizers {', '.join(whole)} evaluates the loss at weights it has moved, which goes with whole models: "
                f"leave --fsdp out."
            )
        for name in ("beta1", "beta2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} must lie in [0, 1), got {getattr(self, name):g}.")
        if not 0 <= self.final_lr <= 1:
            raise InputError(f"--final-lr is a share of --lrs and must lie in [0, 1], got {self.final_lr:g}.")
        for name, allowed in (("schedule", SCHEDULES), ("mixed_precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name.replace('_', '-')} must be one of {', '.join(allowed)}, got {getattr(self, name)}.")

    def runs(self) -> list[Run]:
        """Every run, the seeds of one setting together."""
        return [Run(name, lr, seed) for name in self.optimizers for lr in self.lrs[name] for seed in range(self.seeds)]

    def lr_factor(self, step: int) -> float:
        """The lr of a step (0-based) as a share of the peak: linear warm-up, then cosine decay or constant with cool-down."""
        return lr_factor(self.schedule, step, self.steps, warmup=self.warmup or 0, final=self.final_lr)

    def plain(self) -> dict[str, Any]:
        """This configuration as JSON values."""
        plain = {**asdict(self), "optimizers": list(self.optimizers), "trackers": list(self.trackers), "lrs": dict(self.lrs)}
        # Off as a folder written before there were instruments has them.
        measured = {"instruments": list(self.instruments), "instruments_every": self.instruments_every}
        return {**plain, **(measured if self.instruments else dict.fromkeys(measured, False))}
