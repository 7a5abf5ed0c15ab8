"""The callback for Hugging Face Trainer: measures on Trainer's steps, logs where Trainer logs, and changes no training."""

import json

import pytest
import torch

import schatten

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'schatten[hf]'")

from schatten.integrations import hf  # noqa: E402
from schatten.integrations.hf_monitor import MonitorCallback  # noqa: E402
from tests.integrations.test_hf_trainer import OPTIONS, assert_same_weights, tiny_llama, trainer  # noqa: E402


def trained(folder, make=None, resume=None):
    run = trainer(folder, optimizer_cls_and_kwargs=(hf.Muon, OPTIONS))
    callback = None if make is None else make(run)
    if callback is not None:
        run.add_callback(callback)
    run.train(resume_from_checkpoint=resume)
    return run, callback


def test_trainer_logs_every_measured_step_and_trains_as_without(tmp_path):
    seen = []
    quantities = ["gradient", "update", "constraint"]
    run, callback = trained(tmp_path, lambda run: MonitorCallback(run, every=2, quantities=quantities, to=seen.append))
    bare, _ = trained(tmp_path)
    assert_same_weights(run, bare)
    measured = [entry for entry in run.state.log_history if any(key.startswith("update/rms/") for key in entry)]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert sorted({record["step"] for record in seen}) == [2, 4]
    name = "model.layers.0.mlp.up_proj.weight"
    (record,) = [record for record in callback.monitor.records if record["name"] == name]
    assert measured[-1][f"update/rms/{name}"] == record["update/rms"] > 0
    inner = run.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks


def test_a_resumed_run_counts_on_and_appends(tmp_path):
    file = tmp_path / "run.jsonl"

    def make(_):
        return MonitorCallback(every=1, quantities=["gradient"], to=file)

    whole, _ = trained(tmp_path, make)
    rest, callback = trained(tmp_path, make, resume=str(tmp_path / "checkpoint-2"))
    assert_same_weights(whole, rest)
    steps = list(dict.fromkeys(json.loads(line)["step"] for line in file.read_text().splitlines()))
    assert steps == [1, 2, 3, 4] and callback.monitor.records[0]["step"] == 4
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = [line for line in lines if line["step"] == 4]
    half = len(last) // 2
    assert last[:half] == last[half:], "the resumed run measures the same numbers"


def test_curvature_of_a_batch_is_measured_on_the_model_that_trainer_trains(tmp_path):
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))

    def make(run):
        return MonitorCallback(run, every=4, quantities=["curvature"], loss=lambda: run.model(input_ids=ids, labels=ids).loss)

    run, callback = trained(tmp_path, make)
    assert all(record["curvature/L"] > 0 for record in callback.monitor.records)
    assert_same_weights(run, trained(tmp_path)[0])


def test_another_optimizer_is_refused_when_training_begins(tmp_path):
    model = tiny_llama()
    run = trainer(tmp_path, model=model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    run.add_callback(MonitorCallback(run))
    with pytest.raises(TypeError, match=r"schatten\.SpectralOptimizer, such as schatten\.Muon, got AcceleratedOptimizer"):
        run.train()
    assert schatten.Muon is hf.Muon()
