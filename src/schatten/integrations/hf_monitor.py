"""Hugging Face Trainer: `schatten.Monitor` as a callback, whose numbers go where Trainer logs and to writers of one's own.

trainer = Trainer(model, args, optimizer_cls_and_kwargs=(hf.Muon, {"lr": 3e-4}), ...)
trainer.add_callback(MonitorCallback(trainer, every=100, to="run.jsonl"))
"""

from collections.abc import Iterable, Sequence
from typing import Any

from schatten.diagnostics.core import Quantity
from schatten.monitor import Monitor
from schatten.monitor.measurement import Loss
from schatten.monitor.monitor import DEFAULT
from schatten.monitor.values import scalars

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("MonitorCallback needs transformers: pip install 'schatten[hf]'", name=error.name) from error


class MonitorCallback(TrainerCallback):
    """Attaches a `schatten.Monitor` to the optimizer that Trainer trains with, and takes it off at the end.

    Args:
        trainer: whose `log` gets "quantity/column/parameter" of every measured step, so TensorBoard, Weights & Biases and
            the others that it reports to; None for writers alone.
        every, quantities, model, loss, to: `Monitor`'s. Steps are Trainer's, also after a resume; the model is by default
            the one that Trainer trains.

    `monitor` is the last one, for its `records` and `table()`.

    Example: examples of both callbacks are in docs/instruments.md.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        every: int = 100,
        quantities: Iterable[str | Quantity] = DEFAULT,
        model: Any = None,
        loss: Loss | Sequence[Loss] | None = None,
        to: Any = None,
    ) -> None:
        self.trainer, self.model, self.monitor = trainer, model, None
        self._options: dict[str, Any] = {"every": every, "quantities": list(quantities), "loss": loss, "to": to}
        self._logged = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach."""
        self._close()
        model = self.model if self.model is not None else kwargs["model"]
        self.monitor = Monitor(kwargs["optimizer"], model=model, **self._options)
        self._logged = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what this step's measurement has found, if it was measured."""
        if self.monitor is None or not self.monitor.records or self.monitor.records[0]["step"] == self._logged:
            return
        self._logged = self.monitor.records[0]["step"]
        if self.trainer is not None:
            self.trainer.log(scalars(self.monitor.records))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take it off."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
