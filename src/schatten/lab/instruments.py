"""Instruments of a comparison: `schatten.Monitor` on a run, torch's AdamW included, without counting in the run's times."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import schatten
from schatten.diagnostics.core import Quantity
from schatten.diagnostics.spectrum import Spectrum
from schatten.lab.errors import InputError
from schatten.monitor import Monitor, chosen, known
from schatten.monitor.measurement import Loss, Measurement
from schatten.monitor.values import records, rows

# Bins fine enough for pictures, where weights' singular values are.
SPECTRUM = Spectrum(bins=160, weight=(1e-3, 1e2))

# What the Hessian is of, and micro-batches enough for a quantity of their spread.
BATCHES, MICRO_BATCHES = 1, 8

# What these say is of a rule's own problem, which AdamW's is not.
OF_THE_RULE = ("conditioning", "lyapunov", "stationarity")

Write = Callable[[Mapping[str, Any]], None]


def check(names: Sequence[str], fsdp: bool) -> None:
    """Raise InputError for instruments that are unknown, named twice, or cannot be measured on sharded models."""
    if unknown := [name for name in names if name not in known()]:
        raise InputError(f"--instruments has no {', '.join(map(repr, unknown))}: known are {', '.join(known())}.")
    if len(set(names)) < len(names):
        raise InputError(f"--instruments must name each once, got {','.join(names)}.")
    if fsdp and (whole := [name for name in names if known()[name].needs & {"hessian", "losses"}]):
        raise InputError(
            f"--instruments {', '.join(whole)} differentiates twice, which gathered weights do not allow: leave --fsdp out."
        )


def batches(names: Sequence[str]) -> int:
    """How many micro-batches the losses of these quantities are to be of."""
    return MICRO_BATCHES if any("losses" in known()[name].needs for name in names) else BATCHES


class Instruments:
    """Quantities of a run's matrices at every n-th step, each record given to `write`.

    For torch's AdamW, which has no rule, matrices are those that Muon would orthogonalise, momentum is its first moment, and
    `constraint` is against the ball that Muon would have with its decay; what speaks of a rule's problem is left out.
    """

    def __init__(
        self,
        names: Sequence[str],
        every: int,
        optimizer: Optimizer,
        *,
        model: nn.Module,
        losses: Sequence[Loss],
        step: Callable[[], int],
        write: Write,
    ) -> None:
        self._seconds, self._start = 0.0, 0.0
        # The clock runs from the first hook to the last, before the step and again after it.
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._begin)
        try:
            if isinstance(optimizer, schatten.SpectralOptimizer):
                Monitor(optimizer, every, quantities(names), model=model, loss=losses, to=write)
            elif own := quantities([name for name in names if name not in OF_THE_RULE]):
                _Baseline(optimizer, every, own, model, losses, step, write)
        except (TypeError, ValueError) as error:
            raise InputError(f"--instruments: {error}") from None
        optimizer.register_step_pre_hook(self._end)
        optimizer.register_step_post_hook(self._end)

    def seconds(self) -> float:
        """What measuring has taken since this was asked for last."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _begin(self, *_: Any) -> None:
        self._start = _now()

    def _end(self, *_: Any) -> None:
        self._seconds += _now() - self._start


class _Baseline:
    """What `Monitor` does, for torch's AdamW."""

    def __init__(
        self,
        optimizer: Optimizer,
        every: int,
        quantities: Sequence[Quantity],
        model: nn.Module,
        losses: Sequence[Loss],
        step: Callable[[], int],
        write: Write,
    ) -> None:
        self.optimizer, self.every, self.quantities = optimizer, every, quantities
        self.model, self.losses, self.step, self.write = model, losses, step, write
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        self.reader = schatten.Muon(model, weight_decay=decay)
        self.open: Measurement | None = None
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, *_: Any) -> None:
        self.open = None
        if (self.step() + 1) % self.every == 0:
            # Nothing is stepped by it, and what it reads of state is AdamW's; loading a checkpoint makes that another dict.
            self.reader.state = self.optimizer.state
            for group in self.reader.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]
            self.open = Measurement(self.reader, self.quantities, self.model, self.losses, False)

    def _after(self, *_: Any) -> None:
        measurement, self.open = self.open, None
        if measurement is not None:
            for record in records(self.step() + 1, rows(measurement.finish()), {}):
                self.write(record)


def quantities(names: Sequence[str]) -> tuple[Quantity, ...]:
    """The quantities of these names, as a comparison measures them."""
    return chosen([SPECTRUM if name == SPECTRUM.name else name for name in names]) if names else ()


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
