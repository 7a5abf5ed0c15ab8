"""Schedules: how the learning rate and the momentum move over a run, and the constants Lion's rate asks for.

`PowerCool` is a torch learning rate scheduler. `MomentumSchedule` is none: torch's base class exists to write lr, and a
run steps both. Either is stepped once after each step of the optimizer.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schatten.groups import ALGORITHMS


class PowerCool(LRScheduler):
    r"""Constant lr, then a cool-down by a power of the steps that are left: lr = min(lr_0, c (end - t)^exponent).

        lr_t = lr_0 min(1, (t + 1) / warmup, max(floor, ((end - t) / (cooldown end))^exponent))

    so c = lr_0 / (cooldown end)^exponent, by which the two branches meet at t = (1 - cooldown) end. The exponent 1.2 and
    an `end` behind the last step that is run are those of modded-nanogpt's track 3 (2026); exponent 1 is the linear ramp.
    lr_0 is each group's lr at construction, t counts steps from 0.

    Args:
        optimizer: any torch.optim.Optimizer.
        end: the step at which the power reaches zero. It may lie beyond the last step of the run; behind it lr stays at
            the floor.
        exponent: of the cool-down, > 0.
        cooldown: the fraction of `end` that is cool-down, in (0, 1]; or a mapping from a group's "algorithm" to it, such
            as `{"spectral": 0.8, "adamw": 0.4}`, which lets matrices cool down for longer than the rest. The default is
            that of the benchmark's tuned Muon.
        warmup: steps of a linear warm-up from lr_0 / warmup, 0 for none.
        floor: the least factor on lr_0 of the cool-down, in [0, 1).
        last_epoch: as in torch, -1 for a new run.

    As with torch's own schedulers, construct it before the optimizer loads a checkpoint, and the numbers it loads replace
    those it was constructed with. Raises ValueError for numbers outside their ranges, and for a mapping with an unknown
    algorithm or without that of one of the groups.

    Example:
        >>> import torch, schatten
        >>> from schatten.schedules import PowerCool
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> opt = schatten.Muon(model, lr=1.0)
        >>> scheduler = PowerCool(opt, end=5, exponent=1, cooldown={"spectral": 0.8, "adamw": 0.4})
        >>> for _ in range(5):
        ...     print([round(group["lr"], 2) for group in opt.param_groups])
        ...     opt.step()
        ...     scheduler.step()
        [1.0, 1.0]
        [1.0, 1.0]
        [0.75, 1.0]
        [0.5, 1.0]
        [0.25, 0.5]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        end: float,
        exponent: float = 1.2,
        *,
        cooldown: float | Mapping[str, float] = 0.7,
        warmup: int = 0,
        floor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < end < math.inf:
            raise ValueError(f"end must be a positive number of steps, got {end}.")
        if not 0 < exponent < math.inf:
            raise ValueError(f"exponent must be positive and finite, got {exponent}; 1 is the linear ramp.")
        if not isinstance(warmup, int) or not 0 <= warmup < end:
            raise ValueError(f"warmup must be a whole number of steps from 0 to less than end={end}, got {warmup!r}.")
        if not 0 <= floor < 1:
            raise ValueError(f"floor must lie in [0, 1), as a fraction of the full lr, got {floor}.")
        self.end, self.exponent, self.warmup, self.floor = end, exponent, warmup, floor
        # A plain dict, so that a checkpoint holds no class of the caller's.
        self.cooldown = dict(cooldown) if isinstance(cooldown, Mapping) else cooldown
        if isinstance(optimizer, Optimizer):  # what is none, torch refuses
            _check_cooldown(self.cooldown, optimizer.param_groups)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The lr of every group at the current step, from the formula: no step depends on the one before it."""
        groups = zip(self.base_lrs, self.optimizer.param_groups, strict=True)
        return [lr * self._factor(self._fraction(group)) for lr, group in groups]

    def _factor(self, fraction: float) -> float:
        t = self.last_epoch
        remaining = min(1.0, max(0.0, self.end - t) / (fraction * self.end))
        warm = (t + 1) / self.warmup if self.warmup else 1.0
        return min(1.0, warm, max(self.floor, remaining**self.exponent))

    def _fraction(self, group: Mapping[str, Any]) -> float:
        return self.cooldown[group["algorithm"]] if isinstance(self.cooldown, dict) else self.cooldown


def _check_cooldown(cooldown: float | dict[str, float], groups: list[dict[str, Any]]) -> None:
    fractions = cooldown if isinstance(cooldown, dict) else {"every group": cooldown}
    for key, fraction in fractions.items():
        if not 0 < fraction <= 1:
            raise ValueError(f"cooldown must lie in (0, 1], as a fraction of end, got {fraction} for {key}.")
    if not isinstance(cooldown, dict):
        return
    for key in cooldown:
        if key not in ALGORITHMS:
            raise ValueError(f"cooldown has the key {key!r}, but algorithms are {', '.join(map(repr, ALGORITHMS))}.")
    for g, group in enumerate(groups):
        if "algorithm" not in group:
            raise ValueError(f"cooldown is given by algorithm, but group {g} has no key 'algorithm': pass one number.")
        if group["algorithm"] not in cooldown:
            raise ValueError(f"cooldown has no number for the algorithm {group['algorithm']!r} of group {g}: add one.")


class MomentumSchedule:
    r"""Momentum that rises linearly, stays, and falls back at the end: low while the signal changes, high between.

        beta_t = start + (peak - start) t / warmup                       for t < warmup
                 peak + (end - peak) (t - steps + cooldown) / cooldown   for t > steps - cooldown
                 peak                                                    otherwise

    Writes `group["momentum"]` of every spectral group that has it, and of groups without an "algorithm", such as
    torch.optim.SGD's; an AdamW group keeps its own, and no lr is touched. The defaults are those of modded-nanogpt's
    track 3 (2026), whose runs take about 3000 steps.

    Args:
        optimizer: any torch.optim.Optimizer with such a group.
        steps: length of the run; beta stays at `end` behind it.
        start, peak, end: beta at the first step, between the ramps and after the last step, in [0, 1).
        warmup, cooldown: lengths of the ramps in steps, 0 for none.

    It writes beta at construction, at every `step()` and on `load_state_dict()`; loaded numbers replace those it was
    constructed with. With OneCycleLR or CyclicLR pass them `cycle_momentum=False`: they write the same key. Raises
    ValueError for numbers outside their ranges, ramps that overlap, and an optimizer without a momentum to write.

    Example:
        >>> import torch, schatten
        >>> from schatten.schedules import MomentumSchedule
        >>> opt = schatten.Muon([torch.nn.Parameter(torch.eye(4))])
        >>> schedule = MomentumSchedule(opt, steps=6, warmup=2, cooldown=2)
        >>> betas = []
        >>> for _ in range(7):
        ...     betas.append(round(opt.param_groups[0]["momentum"], 2))
        ...     opt.step()
        ...     schedule.step()
        >>> betas
        [0.85, 0.9, 0.95, 0.95, 0.95, 0.9, 0.85]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        start: float = 0.85,
        peak: float = 0.95,
        warmup: int = 300,
        end: float = 0.85,
        cooldown: int = 150,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"MomentumSchedule needs a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        for name, beta in (("start", start), ("peak", peak), ("end", end)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), as a momentum, got {beta}.")
        for name, length in (("steps", steps), ("warmup", warmup), ("cooldown", cooldown)):
            if not isinstance(length, int) or length < 0:
                raise ValueError(f"{name} must be a whole number of steps >= 0, got {length!r}.")
        if warmup + cooldown > steps:
            raise ValueError(f"warmup={warmup} and cooldown={cooldown} overlap in steps={steps}: shorten them.")
        self.optimizer = optimizer
        self.steps, self.warmup, self.cooldown = steps, warmup, cooldown
        self.start, self.peak, self.end = start, peak, end
        self.last_step = 0
        if not self._groups():
            raise ValueError(
                f"No group of {type(optimizer).__name__} has a momentum to schedule: spectral groups need the key 'momentum'. "
                f"One whose signal has two betas is not meant here."
            )
        self._write()

    def momentum_at(self, step: int) -> float:
        """beta at `step`, counted from 0."""
        late = step - (self.steps - self.cooldown)
        if step < self.warmup:
            return self.start + (self.peak - self.start) * step / self.warmup
        if self.cooldown and late > 0:
            return self.peak + (self.end - self.peak) * min(1.0, late / self.cooldown)
        return self.peak

    def step(self) -> None:
        """Go on to the next step's beta; call it after the optimizer's step."""
        self.last_step += 1
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the step and the schedule."""
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, and write its beta, so that it may be loaded before or after the optimizer."""
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(f"This is not a MomentumSchedule's state: it has the keys {sorted(map(str, state_dict))}.")
        vars(self).update(state_dict)
        self._write()

    def _groups(self) -> list[dict[str, Any]]:
        groups = self.optimizer.param_groups
        return [group for group in groups if "momentum" in group and group.get("algorithm", "spectral") == "spectral"]

    def _write(self) -> None:
        for group in self._groups():
            group["momentum"] = self.momentum_at(self.last_step)


def lion_rate(
    steps: int, dimension: int, c1: float = 1.0, c2: float = 1.0, c3: float = 1.0
) -> tuple[float, tuple[float, float]]:
    r"""`(lr, (beta1, beta2))` by which Lion converges at the rate O(sqrt(d) K^(-1/4)) (arXiv 2411.07724).

        beta1 = 1 - c1 / sqrt(K),   beta2 = 1 - c2 / sqrt(K),   lr = c3 / (sqrt(d) K^(3/4))

    for K steps in dimension d: the mean of E||grad||_1 over the run, or with decay lambda the KKT residual under
    ||W||_inf <= 1/lambda. The constants depend on the problem's smoothness and noise, which the theorem does not know:
    the formula says how a tuned setting moves with K and d, not what it is. Nothing is annealed: lr and 1 - beta are
    constant over the run, and small because the run is long.

    Args:
        steps: K, at least 1.
        dimension: d, the number of trained parameters.
        c1, c2: positive and at most sqrt(K), so that the betas lie in [0, 1).
        c3: positive.

    Raises ValueError for anything else.

    Example:
        >>> from schatten.schedules import lion_rate
        >>> lion_rate(steps=10_000, dimension=10_000)
        (1e-05, (0.99, 0.99))
    """
    for name, count in (("steps", steps), ("dimension", dimension)):
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}.")
    if not 0 < c3 < math.inf:
        raise ValueError(f"c3 must be positive and finite, got {c3}.")
    betas = (1 - c1 / math.sqrt(steps), 1 - c2 / math.sqrt(steps))
    for name, c, beta in (("c1", c1, betas[0]), ("c2", c2, betas[1])):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be positive and at most sqrt(steps) = {math.sqrt(steps):.6g}, got {c}.")
    return c3 / (math.sqrt(dimension) * steps**0.75), betas
