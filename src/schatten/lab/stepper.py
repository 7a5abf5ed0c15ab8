"""A training step on accelerate: forward, backward, accumulation, clipping, the optimizer; or the optimizer's own closure."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Piece = tuple[Tensor, ...]


@dataclass
class Stepper:
    """Steps `optimizer`, as accelerate prepared it, on `loss(*piece)`; gradients are clipped at global norm `clip`, 0 is off.

    Groups carry their peak lr in "initial_lr". `seconds` adds up what was spent in the optimizer; with a closure that is
    the whole step.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    loss: Callable[..., Tensor]
    clip: float
    seconds: float = 0.0

    def set_lr(self, factor: float) -> None:
        """Every group's lr as a share of its own peak: AdamW's differs from the matrices' where their units do."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def step(self, pieces: Sequence[Piece]) -> Tensor:
        """One step on the gradients accumulated over `pieces`; their mean loss in this process."""
        losses = []
        for piece in pieces:
            with self.accelerator.accumulate(self.model):
                loss = self._loss(piece)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip()
                before = self._clock()
                self.optimizer.step()
                self.seconds += self._clock() - before
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        return torch.stack(losses).mean()

    def step_with_closure(self, piece: Piece) -> Tensor:
        """One step of an optimizer that evaluates the loss itself, once or more; the last value it saw, over all processes.

        The last is at the present weights: rules that need a gradient at the old ones ask for that first.
        """
        # accelerate's step() returns nothing, so the closure leaves its values here.
        values: list[Tensor] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._loss(piece)
            if torch.is_grad_enabled():
                self.accelerator.backward(loss)
                self._clip()
            values.append(self.mean(loss.detach()))
            return values[-1]

        before = self._clock()
        self.optimizer.step(closure)
        self.seconds += self._clock() - before
        self.optimizer.zero_grad()
        return values[-1]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        mean = self.accelerator.reduce(value, "mean")
        assert isinstance(mean, Tensor)
        return mean

    def _loss(self, piece: Piece) -> Tensor:
        with self.accelerator.autocast():  # a sharded model is not accelerate's to wrap
            return self.loss(*piece)

    def _clip(self) -> None:
        if self.clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)

    def _clock(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
