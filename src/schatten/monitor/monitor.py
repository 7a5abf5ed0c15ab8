"""Monitor: quantities of an optimizer's matrices, measured at every n-th step and written down."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from schatten.diagnostics.core import Quantity
from schatten.monitor import table
from schatten.monitor.listing import chosen
from schatten.monitor.measurement import Loss, Measurement, refuse
from schatten.monitor.values import Row, records, rows
from schatten.monitor.writers import writers_of
from schatten.optimizer import SpectralOptimizer

DEFAULT = ("constraint", "gradient")


class Alarm(UserWarning):
    """What a quantity says of a matrix that the theory forbids; once for each."""


class Monitor:
    """Measures `quantities` of every matrix at each `every`-th step of `opt` and writes them; training does not notice.

    Args:
        opt: a `SpectralOptimizer`, or what wraps one (accelerate, Lightning, `EMANesterov`). The loop stays as it is.
        every: steps number `every`, 2 `every`, ... are measured; between them nothing is done but counting.
        quantities: names, or instances with options of their own, of `schatten.monitor.known()`.
        model: the module that `loss` evaluates, wrapped as it is trained: its buffers are kept as they are, and under
            DistributedDataParallel the Hessian is the mean over ranks.
        loss: for quantities of the Hessian or of micro-batches: a function without arguments that returns the loss of a batch,
            or a list of them.
        to: where records go: a path ending in .jsonl, a folder or SummaryWriter of TensorBoard, a function of a record, or a
            list of these. Rank 0 writes; records are on every rank.

    Weights, gradients and momentum are those that a step starts from, gradients after clipping and unscaling; the update is the
    weight's change in it without decay. For the update, and where `step` evaluates a closure, a measured step copies the
    weights (and the momentum, where that is measured). A parameter whose gradient is gone (`step_in_backward`) or None has
    quantities of its weight and momentum only. Of DTensors (FSDP2) one parameter at a time is whole on every rank, all of which
    must have this monitor.

    A record is a dict of "step", "name" (that of a parameter, with the `.0` of its state where it has blocks of several sizes
    and `[0]` where it has several blocks; "model" for all together) and "quantity/column" for each number, or list of them.
    Of more than 16 blocks there is one record, with the smallest, mean and largest values. An alarm is warned of once for each
    matrix, as an `Alarm`, and is in its records under "quantity/alarm".

    Raises ValueError or TypeError for an unknown quantity or one that lacks what it needs, and for other optimizers.

    Example:
        >>> import torch, schatten
        >>> from schatten.monitor import Monitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
        >>> opt = schatten.Muon(model)
        >>> with Monitor(opt, every=2, quantities=["gradient"]) as monitor:
        ...     for _ in range(3):
        ...         model(torch.ones(1, 4)).sum().backward()
        ...         opt.step()
        >>> [(record["step"], record["name"]) for record in monitor.records]
        [(2, '0.weight'), (2, '1.weight')]
    """

    def __init__(
        self,
        opt: Optimizer,
        every: int = 100,
        quantities: Iterable[str | Quantity] = DEFAULT,
        *,
        model: nn.Module | None = None,
        loss: Loss | Sequence[Loss] | None = None,
        to: Any = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive number of steps, got {every!r}.")
        self.opt = _unwrapped(opt)
        self.every, self.quantities, self.model = every, chosen(quantities), model
        self.losses: list[Loss] = [] if loss is None else [loss] if callable(loss) else list(loss)
        refuse(self.opt, self.quantities, model, self.losses)
        self._writers = writers_of(to, _bins(self.quantities)) if _writes() else []
        self._open: Measurement | None = None
        self._rows: list[Row] = []
        self._alarmed: set[tuple[str, str]] = set()
        self._told = False
        # The records of the last measured step, one for each matrix.
        self.records: list[dict[str, Any]] = []
        self._hooks = [
            self.opt.register_step_pre_hook(self._before_step),
            self.opt.register_step_post_hook(self._after_step),
        ]

    # -- in a step -----------------------------------------------------------------------------------------------------

    def _step_number(self) -> int:
        return max(group["step"] for group in self.opt.param_groups)

    @_disable_dynamo
    def _before_step(self, _: Optimizer, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        # What a step that was broken off has left.
        self._open = None
        if (self._step_number() + 1) % self.every:
            return
        self.opt._ranks.settle()
        closure = options.get("closure", args[1] if len(args) > 1 else None) is not None
        self._open = Measurement(self.opt, self.quantities, self.model, self.losses, closure)

    @_disable_dynamo
    def _after_step(self, *_: Any) -> None:
        measurement, self._open = self._open, None
        if measurement is None:
            return
        found = measurement.finish()
        found_inf: Tensor | None = getattr(self.opt, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        made = rows(found)
        alarms = self._alarms(made)
        self._rows = made
        self.records = records(self._step_number(), made, alarms)
        for writer in self._writers:
            writer.write(self.records)
        self._warn(alarms, measurement)

    def _alarms(self, made: Sequence[Row]) -> dict[tuple[str, str], str]:
        """What quantities say of the last values and these, by matrix and quantity."""
        before: dict[tuple[str, str], Mapping[str, Any]] = {(row.name, row.quantity): row.columns for row in self._rows}
        watching: dict[str, Callable[..., str | None]] = {
            q.name: alarm for q in self.quantities if (alarm := getattr(q, "alarm", None)) is not None
        }
        found = {}
        for row in made:
            key = row.name, row.quantity
            if key in before and row.quantity in watching and (message := watching[row.quantity](before[key], row.columns)):
                found[key] = message
        return found

    def _warn(self, alarms: Mapping[tuple[str, str], str], measurement: Measurement) -> None:
        if not _writes():
            return
        if measurement.without_gradient and not self._told:
            self._told = True
            warnings.warn(
                "No matrix has a gradient when step() is called, so quantities of gradients and updates are left out: "
                "step_in_backward frees gradients before. Call step() after backward to measure them.",
                stacklevel=2,
            )
        for (name, quantity), message in alarms.items():
            if (name, quantity) not in self._alarmed:
                self._alarmed.add((name, quantity))
                warnings.warn(f"{name}, step {self._step_number()}, {quantity}: {message}", Alarm, stacklevel=2)

    # -- what can be seen ----------------------------------------------------------------------------------------------

    def table(self, by: str | None = None, shown: int | None = table.SHOWN) -> str:
        """The last records as a table: those with an alarm first, then the largest of column `by`, "quantity/column"."""
        return table.text(self.records, by, shown)

    def __str__(self) -> str:
        return self.table()

    def close(self) -> None:
        """Leave the optimizer as it was, and end what is written; records stay."""
        for hook in self._hooks:
            hook.remove()
        for writer in self._writers:
            writer.close()
        self._hooks, self._writers, self._open = [], [], None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _unwrapped(opt: Any) -> SpectralOptimizer:
    """The optimizer itself: accelerate, Lightning and EMANesterov keep the one they wrap as `optimizer`."""
    inner = opt
    while isinstance(wrapped := getattr(inner, "optimizer", None), Optimizer):
        inner = wrapped
    if not isinstance(inner, SpectralOptimizer):
        raise TypeError(
            f"Monitor reads the rules and matrices of a schatten.SpectralOptimizer, such as schatten.Muon, got "
            f"{type(opt).__name__}: for other optimizers call the functions of schatten.diagnostics on tensors."
        )
    return inner


def _bins(quantities: Iterable[Quantity]) -> dict[str, list[float]]:
    """The edges of the bins of histograms, by "quantity/column"."""
    found = {}
    for q in quantities:
        for column in q.columns if hasattr(q, "edges") else ():
            if column.endswith("_histogram"):
                found[f"{q.name}/{column}"] = q.edges(column.removesuffix("_histogram")).tolist()  # type: ignore[attr-defined]
    return found


def _writes() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
