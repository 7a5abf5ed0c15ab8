"""Lightning: `schatten.Monitor` as a callback, whose numbers go to the trainer's loggers and to writers of one's own.

Trainer(callbacks=[MonitorCallback(every=100, to="run.jsonl")])
"""

from collections.abc import Iterable, Sequence
from typing import Any

from schatten.diagnostics.core import Quantity
from schatten.monitor import Monitor
from schatten.monitor.measurement import Loss
from schatten.monitor.monitor import DEFAULT
from schatten.monitor.values import scalars

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("MonitorCallback needs Lightning: pip install 'schatten[lightning]'", name=error.name) from error


class MonitorCallback(Callback):
    """Attaches a `schatten.Monitor` to an optimizer of the trainer when training starts, and takes it off at the end.

    Args:
        every, quantities, loss, to: `Monitor`'s; the model is the LightningModule.
        optimizer: which of the module's optimizers, by its number.

    The trainer's loggers get "quantity/column/parameter" at every measured step, counted as the optimizer counts. Lightning
    evaluates the loss in a closure, so a measured step copies the weights. `monitor` is the last one, for its `records` and
    `table()`.

    Example: examples of both callbacks are in docs/instruments.md.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        quantities: Iterable[str | Quantity] = DEFAULT,
        loss: Loss | Sequence[Loss] | None = None,
        to: Any = None,
        optimizer: int = 0,
    ) -> None:
        self.optimizer, self.monitor = optimizer, None
        self._options: dict[str, Any] = {"every": every, "quantities": list(quantities), "loss": loss, "to": to}
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        self._close()
        self.monitor = Monitor(trainer.optimizers[self.optimizer], model=pl_module, **self._options)
        self._logged = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the last measurement has found, if that is new."""
        if self.monitor is None or not self.monitor.records or self.monitor.records[0]["step"] == self._logged:
            return
        self._logged = self.monitor.records[0]["step"]
        for logger in trainer.loggers:
            logger.log_metrics(scalars(self.monitor.records), step=self._logged)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it off."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take it off where training has failed, too."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
