"""Training with a clock: the loop that every optimizer runs, from the same weights over the same tokens.

The device is waited for at evaluations and at a run's ends alone: marks are CUDA events, losses stay where they are.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train_gpt2_parts.optimizers import Optimizers, build, routes, state_bytes
from benchmarks.train_gpt2_parts.settings import DTYPES, Settings, gpt_config
from schatten.lab.data import Corpus, batch, validation_windows
from schatten.lab.models import GPT
from schatten.lab.schedule import lr_factor

# Windows evaluated at once, by the model that is not compiled: their logits in fp32 are 3.3 GB for GPT-2.
EVAL_BATCH = 16

# Steps of a rehearsal between its first and those that are timed.
SETTLING = 2

# Steps of a rehearsal that are timed.
TIMED = 4


class Clock:
    """Marks on the device's own time line, and the seconds between two of them."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> float:
        """The time, once the device has done all that was asked of it."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Only after `wait`."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of an optimizer's very first step, of the optimizer's part of that, and of a later step."""

    first_step: float
    first_optimizer_step: float
    step: float


class Trainer:
    """A model and its data. `first_pass` are the seconds of the first forward and backward pass.

    `loss` is the validation loss of the initial weights, and `evaluation` how many seconds another takes. One compiled model
    serves all optimizers, which get the plain one: the parameters are the same, their names without a prefix.
    """

    def __init__(self, settings: Settings, corpus: Corpus) -> None:
        self.settings, self.corpus, self.clock = settings, corpus, Clock(settings.device)
        torch.manual_seed(settings.seed)
        self.plain = GPT(gpt_config(settings, corpus)).to(settings.device)
        # In the host's memory, where they do not count as the run's.
        self.initial = [p.detach().cpu().clone() for p in self.plain.parameters()]
        compiled = torch.compile(self.plain, dynamic=False, backend=settings.backend) if settings.compiled else self.plain
        self.model: Callable[[Tensor, Tensor], Tensor] = compiled
        start = self.clock.wait()
        self.gradients(0)
        self.first_pass = self.clock.wait() - start
        self.loss = self.evaluate()
        start = self.clock.wait()
        self.evaluate()
        self.evaluation = self.clock.wait() - start

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.settings.dtype]
        return torch.autocast(self.settings.device, dtype=dtype, enabled=dtype != torch.float32)

    def begin(self, name: str) -> Optimizers:
        """Fresh optimizers of the initial weights, nothing of an earlier one being left."""
        with torch.no_grad():
            for p, value in zip(self.plain.parameters(), self.initial, strict=True):
                p.copy_(value)
        self.forget_gradients()
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = build(name, self.plain, self.settings.lrs[name], self.settings.weight_decay)
        for optimizer in found:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return found

    def forget_gradients(self) -> None:
        for p in self.plain.parameters():
            p.grad = None

    def to_device(self, tokens: Tensor) -> Tensor:
        return tokens.pin_memory().to("cuda", non_blocking=True) if self.clock.cuda else tokens

    def gradients(self, step: int) -> Tensor:
        """The gradients of step `step`, clipped; its training loss, on the device."""
        s = self.settings
        both = batch(self.corpus.train, s.context, s.windows, seed=s.seed, step=step)
        ids, targets = (self.to_device(part) for part in both)
        total = torch.zeros((), device=s.device)
        for x, y in zip(ids.split(s.batch), targets.split(s.batch), strict=True):
            with self.autocast():
                loss = self.model(x, y) / s.accumulate
            loss.backward()
            total += loss.detach()
        if s.clip:
            nn.utils.clip_grad_norm_(self.plain.parameters(), s.clip)
        return total

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the validation windows, which are the same every time."""
        s = self.settings
        ids, targets = validation_windows(self.corpus.validation, s.context, s.eval_windows)
        total = torch.zeros((), device=s.device)
        for x, y in zip(ids.split(EVAL_BATCH), targets.split(EVAL_BATCH), strict=True):
            with self.autocast():
                total += self.plain(x.to(s.device), y.to(s.device)) * len(x)
        return float(total) / len(ids)

    def set_lr(self, found: Optimizers, step: int, steps: int) -> None:
        factor = lr_factor(self.settings.schedule, step, steps, warmup=self.settings.warmup_of(steps))
        for optimizer in found:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def rehearse(self, name: str) -> Rehearsal:
        """A few steps that are thrown away: after them everything is compiled and tuned, and a step's seconds are known."""
        found = self.begin(name)
        start = self.clock.wait()
        self.gradients(0)
        before = self.clock.wait()
        for optimizer in found:
            optimizer.step()
        after = begun = self.clock.wait()
        self.forget_gradients()
        for step in range(1, 1 + SETTLING + TIMED):
            if step == 1 + SETTLING:
                begun = self.clock.wait()
            self.gradients(step)
            for optimizer in found:
                optimizer.step()
            self.forget_gradients()
        return Rehearsal(after - start, after - before, (self.clock.wait() - begun) / TIMED)

    def train(self, name: str, steps: int, report: Callable[[int, float], None]) -> dict[str, Any]:
        """Train for `steps` steps; `report` hears of every validation loss. The result is a row of the JSON file."""
        s = self.settings
        found = self.begin(name)
        losses = torch.zeros(steps, device=s.device)
        marks, validation = [], [(0, self.loss)]
        evaluations = set(s.evaluations(steps))
        begun = self.clock.wait()
        for step in range(steps):
            self.set_lr(found, step, steps)
            start = self.clock.mark()
            losses[step] = self.gradients(step)
            before = self.clock.mark()
            for optimizer in found:
                optimizer.step()
            marks.append((start, before, self.clock.mark()))
            self.forget_gradients()
            if step + 1 in evaluations:
                validation.append(((step + 1) * s.tokens, self.evaluate()))
                report(step + 1, validation[-1][1])
        seconds = self.clock.wait() - begun
        late = marks[steps // 2 :]
        whole = [self.clock.seconds(start, end) for start, _, end in late]
        own = [self.clock.seconds(before, end) for _, before, end in late]
        return {
            "lr": s.lrs[name],
            "parameters": routes(name, self.plain),
            "tokens_per_second": quartiles([s.tokens / t for t in whole]),
            "step_ms": quartiles([1e3 * t for t in whole]),
            "optimizer_ms": quartiles([1e3 * t for t in own]),
            "optimizer_share": quartiles([a / b for a, b in zip(own, whole, strict=True)]),
            "tokens": steps * s.tokens,
            "train_loss": [_finite(loss) for loss in losses.tolist()],
            "validation": [[tokens, _finite(loss)] for tokens, loss in validation],
            "validation_loss": _finite(validation[-1][1]),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.clock.cuda else None,
            "state_bytes": state_bytes(found),
            "seconds": seconds,
        }


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile; within the range of the values."""
    return statistics.quantiles(values, n=4, method="inclusive")


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def affordable(asked: int, left: float, step_seconds: float) -> int:
    """How many steps of `step_seconds` there is time for in `left` seconds, at most `asked`."""
    return max(0, min(asked, math.floor(left / step_seconds)))
