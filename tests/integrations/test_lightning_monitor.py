"""The callback for Lightning: measures within Lightning's closure, logs to its loggers, and changes no training."""

import pytest
import torch

L = pytest.importorskip("lightning", reason="needs Lightning: pip install 'schatten[lightning]'")
pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'schatten[lightning]'")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from schatten.integrations.lightning_monitor import MonitorCallback  # noqa: E402
from tests.integrations.test_lightning import QUIET, Configured, assert_same_weights, pytestmark  # noqa: E402

assert pytestmark  # the warnings of Lightning that are not ours


def fitted(*callbacks, **options):
    torch.manual_seed(0)
    model = Configured()
    trainer = L.Trainer(callbacks=list(callbacks), **{**QUIET, "enable_checkpointing": False, **options})
    trainer.fit(model)
    return model, trainer


def test_loggers_get_every_measured_step_and_training_is_as_without(tmp_path):
    seen = []
    logger = CSVLogger(str(tmp_path))
    callback = MonitorCallback(every=2, quantities=["gradient", "update", "constraint"], to=seen.append)
    model, trainer = fitted(callback, logger=logger)
    assert_same_weights(model, fitted()[0])
    assert sorted({record["step"] for record in seen}) == [2, 4, 6]
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "update/rms/layers.0.weight" in text.splitlines()[0]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_gradients_are_those_of_the_closure_after_clipping():
    callback = MonitorCallback(every=1, quantities=["gradient"])
    seen = []

    class Clipped(Configured):
        def on_before_optimizer_step(self, _):
            seen.append({name: float(p.grad.norm()) for name, p in self.named_parameters()})

    torch.manual_seed(0)
    trainer = L.Trainer(callbacks=[callback], **{**QUIET, "enable_checkpointing": False, "gradient_clip_val": None})
    trainer.fit(Clipped())
    (first, *_) = callback.monitor.records
    assert first["gradient/frobenius"] == pytest.approx(seen[-1][first["name"]], rel=1e-5)
    torch.manual_seed(0)
    clipped = MonitorCallback(every=1, quantities=["gradient"])
    fitted(clipped, gradient_clip_val=1e-3)
    assert all(record["gradient/frobenius"] <= 1e-3 for record in clipped.monitor.records)


def test_an_exception_leaves_the_optimizer_as_it_was():
    class Failing(Configured):
        def training_step(self, batch, index):
            if index == 3:
                raise KeyError("data")
            return super().training_step(batch, index)

    callback = MonitorCallback(every=1, quantities=["update"])
    trainer = L.Trainer(callbacks=[callback], **{**QUIET, "enable_checkpointing": False})
    with pytest.raises(KeyError, match="data"):
        trainer.fit(Failing())
    assert callback.monitor.records and not callback.monitor.opt._optimizer_step_pre_hooks
