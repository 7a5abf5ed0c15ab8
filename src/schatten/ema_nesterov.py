"""EMA-Nesterov: any optimizer, run from weights shifted ahead along their own smoothed path."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from schatten.placements.local import plain, shard_number
from schatten.placements.regions import arrangement
from schatten.placements.states import placed_as
from schatten.rounding import store_


class EMANesterov(torch.optim.Optimizer):
    r"""EMA-Nesterov (arXiv 2605.25395) around `optimizer`: its gradients are taken ahead of where it stands.

        W_t = step of the inner optimizer from W'_(t-1),    d <- decay d + (1 - decay) (W_t - W_(t-1)),
        W'_t = W_t + beta_t d,    beta_t = beta lr / lr_max

    The forward pass sees W'. The shift is not taken back before the next step, so it is part of W_(t+1) - W_t: on a
    straight path steps grow by 1 / (1 - beta). With beta = 0, and outside [start, stop), it is the inner optimizer bit
    for bit.

    It is a torch.optim.Optimizer that shares the inner one's groups, state and options, so training loops, gradient
    scalers and lr schedulers take it in the inner one's place; what the inner optimizer can do besides, hooks on its
    state_dict included, is reached as `.optimizer`.

    Args:
        optimizer: any torch.optim.Optimizer.
        beta: the shift in units of d, in [0, 1).
        decay: of the average d, in [0, 1).
        start, stop: shift from this step on and before that one, counted from 0; `stop=None` is never. d is averaged at
            every step.

    lr_max is the group's "max_lr" (OneCycleLR writes it), else its "initial_lr" (every torch scheduler writes it), else
    its lr when it was added here; lr / lr_max counts as at most 1. lr is that of the step just taken: the shift
    follows a schedule one step late, because the weights must be shifted before the scheduler is stepped.

    State: d and the last W of every parameter, fp32 for half-precision ones. The shift of a bf16 weight is rounded
    stochastically, as d is mostly far below what bf16 resolves next to W: it is right in the mean, at the price of noise
    of at most one unit in the last place of each shifted weight. An fp16 weight is rounded to nearest, where an entry whose
    shift is below half a unit in the last place, 0.05 % of it, is not shifted. A parameter without gradient coasts: it
    goes on along its own d, which decays to zero after a way of at most beta d / ((1 - decay) (1 - beta)). Non-finite
    weights make d non-finite and stay so, as without the wrapper.

    Differences from the authors' code: the shift is made at the end of `step()` instead of by a call before the forward
    pass, one step late in lr as said above; lr_max is per group; half-precision weights are handled as said above.

    Checkpoints: `state_dict()` is the inner optimizer's with the key "ema_nesterov" added. The model's weights between
    steps are W'; a run resumes exactly from them. `unshifted()` gives W, for evaluation and for weights to publish. Of a
    DTensor d and W are DTensors placed as it is, and nothing is sent.

    Raises TypeError or ValueError for what is no optimizer and for numbers outside their ranges.

    Example:
        >>> import torch, schatten
        >>> W = torch.nn.Parameter(torch.zeros(1))
        >>> opt = schatten.EMANesterov(torch.optim.SGD([W], lr=1.0), beta=0.5, decay=0.0)
        >>> for _ in range(3):
        ...     W.grad = -torch.ones(1)
        ...     opt.step()
        >>> with opt.unshifted():
        ...     print(W.item())
        4.25
        >>> W.item()
        5.125
    """

    _evaluating = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        beta: float = 0.6,
        decay: float = 0.99,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"EMANesterov wraps a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        for name, number in (("beta", beta), ("decay", decay)):
            if not 0.0 <= number < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {number}.")
        for name, step in (("start", start), ("stop", start if stop is None else stop)):
            if not isinstance(step, int) or step < 0:
                raise ValueError(f"{name} must be a step, a whole number >= 0, got {step!r}.")
        # torch's constructor would make groups and state of its own; its path for unpickling sets up the rest alone.
        self.__setstate__({"defaults": dict(optimizer.defaults)})
        self.optimizer = optimizer
        self.beta, self.decay, self.start, self.stop = beta, decay, start, stop
        self.steps = 0
        self.shifted = False
        self._first_lr: list[float | Tensor] = []
        self._paths: dict[Tensor, dict[str, Tensor]] = {}
        self._follow_groups()

    def __getstate__(self) -> dict[str, Any]:
        own = ("defaults", "optimizer", "beta", "decay", "start", "stop", "steps", "shifted", "_first_lr", "_paths")
        return {key: getattr(self, key) for key in own}

    # The inner optimizer replaces these when it loads a checkpoint, so they are looked up and never copied.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its path begins here."""
        self.optimizer.add_param_group(param_group)
        self._follow_groups()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """The inner optimizer's step from the shifted weights, then the next shift. A closure's value is returned."""
        if self._evaluating:
            raise RuntimeError("step() inside unshifted() would be undone at its end: leave the context first.")
        self._follow_groups()
        if self.steps == 0:
            self._begin()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        # A step that overlaps with the next forward is not on the weights yet.
        if (ranks := getattr(self.optimizer, "_ranks", None)) is not None:
            ranks.settle()
        self.steps += 1
        self._shift()
        return loss

    @torch.no_grad()
    def _begin(self) -> None:
        # Weights loaded after construction are where the path begins, not a displacement.
        for p, path in self._paths.items():
            path["weight"].copy_(p)

    @torch.no_grad()
    def _shift(self) -> None:
        self.shifted = self.beta > 0 and self.start <= self.steps and (self.stop is None or self.steps < self.stop)
        index = 0
        for group, first_lr in zip(self.param_groups, self._first_lr, strict=True):
            length = self.beta * _relative_lr(group, first_lr)
            for p in group["params"]:
                path = self._path(p)
                # Of a DTensor this rank's own part: nothing here needs more than entries.
                d, old, own = (plain(t) for t in (path["displacement"], path["weight"], p.detach()))
                W = own.to(old.dtype)
                d.lerp_(W - old, 1 - self.decay)
                old.copy_(W)
                if self.shifted:
                    store_(own, old + length * d, "stochastic", _seed(self.steps, _number(p, index)))
                index += 1

    @contextmanager
    def unshifted(self) -> Iterator[None]:
        """Within it the parameters hold W, as the last step left them before the shift; at its end W' again.

        Changes made to the weights within it are lost, and `step()` raises RuntimeError. If the last step shifted nothing
        it does nothing.

        Under FSDP2 the outermost module keeps the weights it has gathered until a backward, so after an evaluation it would go
        on with W: shard it by `fully_shard(model, reshard_after_forward=True)`, or call `model.reshard()` at the end.
        """
        if not self.shifted or self._evaluating:
            yield
            return
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            ahead = [p.clone() for p in params]
            for p in params:
                p.copy_(self._path(p)["weight"])
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False
            with torch.no_grad():
                for p, W in zip(params, ahead, strict=True):
                    p.copy_(W)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with the path of every parameter, in the order of the groups, and the step."""
        self._follow_groups()
        own = {
            "steps": self.steps,
            "shifted": self.shifted,
            "first_lr": list(self._first_lr),
            "paths": [dict(self._path(p)) for group in self.param_groups for p in group["params"]],
        }
        return {**self.optimizer.state_dict(), "ema_nesterov": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue from `state_dict()`; load the model's weights too. beta, decay, start and stop stay this object's.

        Raises ValueError, before anything changes, for a checkpoint without paths or with those of other shapes.
        """
        if "ema_nesterov" not in state_dict:
            raise ValueError(
                "This checkpoint was not made by EMANesterov (it has no key 'ema_nesterov'). To wrap a run that had no "
                "wrapper, load it into the inner optimizer: .optimizer.load_state_dict(...)."
            )
        self._follow_groups()
        own = state_dict["ema_nesterov"]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [tuple(path["weight"].shape) for path in own["paths"]]
        if saved != (live := [tuple(p.shape) for p in params]):
            raise ValueError(f"The checkpoint's paths do not fit these parameters: shapes {saved}, this optimizer has {live}.")
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "ema_nesterov"})
        self.steps, self.shifted = own["steps"], own["shifted"]
        self._first_lr = list(own["first_lr"])
        for p, path in zip(params, own["paths"], strict=True):
            for key, value in self._path(p).items():
                value.copy_(placed_as(path[key], value, value.dtype))

    def _follow_groups(self) -> None:
        """Begin the paths of parameters that the inner optimizer has and this does not know yet, and end those of others, as
        of parameters that a wrapper has sharded.
        """
        for group in self.param_groups[len(self._first_lr) :]:
            lr = group["lr"]
            self._first_lr.append(lr.clone() if isinstance(lr, Tensor) else lr)
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self._paths:
                    W = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                    self._paths[p] = {"displacement": torch.zeros_like(W), "weight": W}
        self._paths = {p: self._paths[p] for group in self.param_groups for p in group["params"]}

    def _path(self, p: Tensor) -> dict[str, Tensor]:
        path = self._paths[p]
        if path["weight"].device != p.device:  # the model was moved after construction
            path.update({key: value.to(p.device) for key, value in path.items()})
        return path


def _relative_lr(group: Mapping[str, Any], first_lr: float | Tensor) -> float | Tensor:
    """lr / lr_max, at most 1, and 0 where both are 0; no tensor is looked at."""
    lr_max = next((group[key] for key in ("max_lr", "initial_lr") if group.get(key) is not None), first_lr)
    lr = group["lr"]
    if isinstance(lr, Tensor) or isinstance(lr_max, Tensor):
        ratio = torch.as_tensor(lr / lr_max).reshape(())
        return torch.where(ratio.isnan(), 0.0, ratio).clamp(max=1.0)
    return min(1.0, lr / lr_max) if lr_max else float(lr > 0)


def _number(p: Tensor, index: int) -> int:
    """What tells the noise of one parameter from another's, and of one shard from another's."""
    if not isinstance(p, DTensor):
        return index
    ranks = sorted(p.device_mesh.mesh.flatten().tolist())
    return shard_number(index, arrangement(p), ranks.index(dist.get_rank()))


def _seed(step: int, index: int) -> int:
    """A seed for the rounding of one parameter's shift at one step; not that of the inner step's own rounding."""
    return (step * 0xD1B54A32D192ED03 + index * 0xABC98388FB8FAC03 + 1) & 0x7FFFFFFFFFFFFFFF
